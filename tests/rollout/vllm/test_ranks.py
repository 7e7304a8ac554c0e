"""vLLM under two ranks: servers that both sample from, and an engine in each rank's process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.models.pretrained import load_model
from rlhf.preflight.load import load_inputs
from tests.faults.processes import free_port, launch
from tests.ranks import together
from tests.rollout.conformance import conforming_model
from tests.rollout.sharing import PATIENCE, sharing
from tests.rollout.vllm.support import needs_vllm
from tests.support import bandit_settings, metrics_of

pytestmark = [needs_vllm, pytest.mark.multi]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Iterator[str]:
    """The URL of a server that was started by hand, as docs/engines.md describes."""
    port = free_port()
    words = f"""
        -m vllm.entrypoints.openai.api_server --model {tiny_model("llama-wide")} --dtype float32
        --host 127.0.0.1 --port {port} --max-model-len 512 --kv-cache-memory-bytes {2**27}
        --skip-tokenizer-init --enable-scale-out --generation-config vllm
        --logprobs-mode processed_logprobs --max-logprobs -1
        --worker-extension-cls rlhf.rollout.vllm.worker.HeldWeights
    """.split()
    environ = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": str(ROOT),
    }
    log = tmp_path_factory.mktemp("server") / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, *words], stdout=out, stderr=out, env=environ, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + PATIENCE
        while not is_healthy(url):
            assert server.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url
        # it is somebody else's: nobody ended it
        assert is_healthy(url)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def run(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of a run on two ranks."""
    for ended in launch(settings, folder / "log", ranks=2, deadline=3 * PATIENCE):
        assert ended.code == 0, ended.said
    return metrics_of(folder)


@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_two_ranks_learn_from_one_server_that_somebody_else_started(
    tmp_path: Path, tiny_model: Any, address: str, mode: str
) -> None:
    """Weights of a sharded model are gathered one by one, for the server and for the export."""
    rollout = {"engine": "vllm-server", "vllm": {"urls": [address], "deadline": PATIENCE}}
    rollout |= {"top_k": 20, "top_p": 0.9}
    changes: dict[str, Any] = {"distributed": {"mode": mode}, "checkpoint": {"export": True}}
    model = tiny_model("llama-wide")
    records = run(tmp_path, bandit_settings(tmp_path, model, steps=3, rollout=rollout, **changes))
    assert [record["rollout/samples"] for record in records] == [64] * 3
    assert max(record["mismatch/k3"] for record in records if "mismatch/k3" in record) < 1e-6
    assert load_model(str(tmp_path / "run" / "model"), torch.device("cpu")).dtype == torch.float32


def test_each_of_two_ranks_has_an_engine_in_its_process(tmp_path: Path, tiny_model: Any) -> None:
    rollout = {"engine": "vllm", "kv_cache_gib": 0.1}
    records = run(tmp_path, bandit_settings(tmp_path, tiny_model("llama-wide"), steps=3, rollout=rollout))
    assert [record["rollout/samples"] for record in records] == [64] * 3
    assert max(record["mismatch/k3"] for record in records if "mismatch/k3" in record) < 1e-6


def test_two_ranks_share_a_server_and_survive_its_loss(tmp_path: Path) -> None:
    conforming_model().save_pretrained(tmp_path)
    together(2, sharing, str(tmp_path), patience=3 * PATIENCE)


def test_servers_of_another_host_are_refused(
    tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = bandit_settings(tmp_path, tiny_model("llama-wide"), rollout={"engine": "vllm-server"})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="on one host, but 2 of the 4 ranks"):
        load_inputs(make_config(settings), world_size=4)
    load_inputs(make_config(settings), world_size=2)
