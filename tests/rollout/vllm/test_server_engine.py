"""vLLM in processes of its own: two real servers, one killed, one frozen, and none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from rlhf.metrics import Max, Sum
from rlhf.rollout.engine import SyncError, generate
from rlhf.types import FinishReason
from tests.rollout.conformance import CHECKS, TOLERANCE, Check, Source, conforming_model, drain, moved, worst
from tests.rollout.models import request
from tests.rollout.vllm.support import PATIENCE, needs_vllm, processes_of, sampled_model, server_of, wait_for

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return conforming_model()


@pytest.fixture(scope="module")
def started(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from rlhf.rollout.vllm.server_engine import VLLMServerEngine
    from rlhf.rollout.vllm.server_pool import Service

    sampled = sampled_model(model, tmp_path_factory, kv_cache_gib=0.1)
    engine = VLLMServerEngine(sampled, Service(replicas=2, deadline=PATIENCE))
    yield engine
    keepers = [replica._keeper for replica in engine._pool.replicas]
    engine.close()
    assert all(keeper is None or keeper.poll() is not None for keeper in keepers)
    assert not engine._pool.folder.exists()


@pytest.fixture
def engine(started: Any, model: PreTrainedModel) -> Any:
    wait_for(lambda: len(started._pool.ready) == 2)
    started.update_weights(Source(model), 0)
    return started


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_vllm_servers_conform(engine: Any, model: PreTrainedModel, check: Check) -> None:
    check(engine, model)
    assert engine.poll() == []


def test_prompts_are_shared_out_and_samples_of_one_stay_together(engine: Any) -> None:
    requests = [request(length, n=3, max_tokens=100) for length in (20, 21, 22, 23)]
    engine.submit(requests)
    servers = {
        r.prompt.id: {s.replica.url for k, s in engine._samples.items() if k.startswith(r.prompt.id)}
        for r in requests
    }
    assert all(len(urls) == 1 for urls in servers.values())
    assert len({url for urls in servers.values() for url in urls}) == 2
    assert len(drain(engine)) == 12


def test_an_update_reaches_samples_in_flight(engine: Any, model: PreTrainedModel) -> None:
    other = moved(model)
    requests = [request(length, n=4, max_tokens=400) for length in (9, 10)]
    engine.submit(requests)
    time.sleep(0.3)
    engine.update_weights(Source(other), 1)
    completions = drain(engine)
    assert len(completions) == 8
    assert {c.versions[-1].version for c in completions} <= {0, 1}
    for completion in completions:
        assert completion.versions[-1].end == len(completion.token_ids)
    assert worst(other, [request(9)], generate(engine, [request(9)])) < TOLERANCE


def test_a_fault_of_one_server_is_named(
    engine: Any, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf.rollout.vllm.client import Replica

    worker = Replica.worker

    def deaf(self: Any, method: str, timeout: float, **kwargs: Any) -> Any:
        if method == "tandem_load" and self is engine._pool.replicas[1]:
            return [0]
        return worker(self, method, timeout, **kwargs)

    monkeypatch.setattr(Replica, "worker", deaf)
    with pytest.raises(SyncError, match=f"{engine._pool.replicas[1].url} at version 1 does not hold"):
        engine.update_weights(Source(moved(model, 1e-3)), 1)


def test_a_server_that_is_killed_within_a_step_costs_no_sample(
    engine: Any, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """For a whole run see every_case.py."""
    engine.measured()
    requests = [request(length, n=4, max_tokens=300) for length in (9, 10, 11, 12)]
    engine.submit(requests)
    time.sleep(0.2)
    killed = engine._pool.replicas[0]
    os.killpg(server_of(killed), signal.SIGKILL)
    completions = drain(engine)
    assert len(completions) == 16
    assert FinishReason.ABORT not in {c.finish_reason for c in completions}
    groups = [[c for c in completions if c.prompt_id == r.prompt.id] for r in requests]
    assert worst(model, requests, groups) < TOLERANCE
    assert engine.measured() == {"rollout/servers": Max(1.0), "rollout/servers_lost": Sum(1.0)}
    # it comes back with the current weights
    wait_for(lambda: killed.ready)
    assert engine.measured() == {"rollout/servers": Max(2.0), "rollout/servers_lost": Sum(0.0)}
    lost, back = (r.getMessage() for r in caplog.records if str(killed) in r.getMessage())
    assert "does not answer" in lost and "samples go to 1 other servers" in lost
    assert "is back and has the current weights" in back
    assert len(generate(engine, [request(9), request(10)])) == 2


def test_a_server_that_freezes_is_started_again_within_the_deadline(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf.rollout.vllm.server_pool import Service

    requests = [request(length, n=4, max_tokens=300) for length in (9, 10)]
    frozen = engine._pool.replicas[1]
    first = server_of(frozen)
    os.killpg(first, signal.SIGSTOP)
    # a short deadline for noticing the loss; the restart keeps the long one
    monkeypatch.setattr(engine, "_service", Service(replicas=2, deadline=20.0))
    engine.submit(requests)
    completions = drain(engine)
    assert len(completions) == 8
    wait_for(lambda: frozen.ready)
    assert server_of(frozen) != first
    assert not Path(f"/proc/{first}").exists()


SCRIPT = """
import os, sys, torch
from rlhf.rollout.vllm.in_process import VLLMModel
from rlhf.rollout.vllm.server_pool import Service
from rlhf.rollout.vllm.server_engine import VLLMServerEngine
model = VLLMModel(sys.argv[1], torch.float32, 128, 150, (2,), kv_cache_gib=0.1)
engine = VLLMServerEngine(model, Service(replicas=1, deadline=300.0))
print(engine._pool.folder, engine._pool.replicas[0]._keeper.pid, flush=True)
sys.stdin.read()
"""


def test_nothing_is_left_when_the_trainer_is_killed(tmp_path: Path) -> None:
    conforming_model().save_pretrained(tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        folder, keeper = trainer.stdout.readline().split()
        group = int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])
        assert len(processes_of(group)) >= 2
        trainer.kill()
    wait_for(lambda: not processes_of(group) and not Path(f"/proc/{keeper}").exists())
    assert not Path(folder).exists()
