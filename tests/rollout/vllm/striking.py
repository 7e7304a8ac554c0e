"""One of two vLLM servers is killed or frozen while it owes samples of a step."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.rollout.engine import RolloutRequest
from tests.rollout.vllm.support import PATIENCE, processes_of, server_of, wait_for
from tests.support import bandit_settings

STEPS, PROMPTS, GROUP = 4, 8, 8
STRUCK = 1
"""The step, from 0."""


def settings_of(folder: Path, model: Path, engine: str, **vllm: Any) -> dict[str, Any]:
    folder.mkdir()
    rollout = {"engine": engine, "kv_cache_gib": 0.1, "vllm": vllm}
    return bandit_settings(folder, model, steps=STEPS, rollout=rollout)


class Blow:
    """Strikes the first server when the samples of half of the prompts of a step have arrived.

    It is told to hold samples before it is asked for others: however fast it is, it owes some when it is
    struck. The last step begins when both servers are there.
    """

    def __init__(self, patch: pytest.MonkeyPatch, number: int) -> None:
        from rlhf.rollout.vllm.servers import VLLMServerEngine

        self.patch, self.number = patch, number
        self.submit = VLLMServerEngine.submit
        self.owed = 0
        self.struck = 0
        self.servers: set[int] = set()
        self.keepers: set[int] = set()
        blow = self
        patch.setattr(VLLMServerEngine, "submit", lambda engine, requests: blow.on(engine, requests))

    def on(self, engine: Any, requests: Sequence[RolloutRequest]) -> None:
        step = step_of(requests)
        if step == STEPS - 1:
            wait_for(lambda: len(engine._pool.ready) == 2)
        for replica in engine._pool.ready:
            self.servers.add(server_of(replica))
            self.keepers.add(replica._keeper.pid)
        if step == STRUCK:
            self.strike(engine, requests)
        else:
            self.submit(engine, requests)
        if step == STEPS - 1:
            assert len({sample.replica for sample in engine._samples.values()}) == 2

    def strike(self, engine: Any, requests: Sequence[RolloutRequest]) -> None:
        from rlhf.rollout.vllm.pool import Service

        victim = engine._pool.replicas[0]
        self.submit(engine, requests[: PROMPTS // 2])
        wait_for(lambda: engine._answers.qsize() == PROMPTS // 2 * GROUP)
        victim.call("POST", "/pause?mode=keep", timeout=PATIENCE)
        rest = requests[PROMPTS // 2 :]
        self.submit(engine, rest)
        later = {f"{request.prompt.id}/{i}" for request in rest for i in range(GROUP)}
        self.owed = sum(engine._samples[key].replica is victim for key in later)
        # all of them are on their way, and the server gives none
        wait_for(lambda: engine._senders._work_queue.empty())
        assert victim.call("GET", "/is_paused", timeout=PATIENCE)["is_paused"]
        # for noticing only: to start again it has as long as before
        self.patch.setattr(engine, "_service", Service(replicas=2, deadline=20.0))
        self.struck = server_of(victim)
        os.killpg(self.struck, self.number)


def step_of(requests: Sequence[RolloutRequest]) -> int | None:
    """None: the probe of an update."""
    label = requests[0].prompt.id.rpartition("@rollout/")[2]
    return int(label) // PROMPTS if label.isdigit() else None


def check_a_loss(
    blow: Blow,
    records: list[dict[str, Any]],
    undisturbed: list[dict[str, Any]],
    told: list[str],
    said: str,
) -> None:
    assert 0 < blow.owed < PROMPTS * GROUP
    assert [record["rollout/samples"] for record in records] == [PROMPTS * GROUP] * STEPS
    for record, other in zip(records, undisturbed, strict=True):
        assert math.isfinite(record["loss/policy"])
        assert record["mismatch/k3"] < 1e-6
        # but for a draw that falls within the rounding of the logits
        assert record["reward/mean"] == pytest.approx(other["reward/mean"], abs=0.03)
    # an operator sees it, in the metrics and in the log
    assert [record["rollout/servers_lost"] for record in records] == [0, 1, 0, 0]
    assert [record["rollout/servers"] for record in records][:: STEPS - 1] == [2, 2]
    assert records[STRUCK]["rollout/servers"] == 1
    assert said in told[0] and "asked of 1 others" in told[0]
    assert "is back and has the weights of now" in told[1]
    assert len(blow.servers) == 3 and blow.struck in blow.servers
    for server in blow.servers:
        assert not processes_of(server)
    assert not [keeper for keeper in blow.keepers if Path(f"/proc/{keeper}").exists()]
