"""Kills or freezes one of two vLLM servers while samples of a training step are outstanding there."""

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
STRUCK_STEP = 1
"""The step in which that happens, counted from 0."""


def settings_of(folder: Path, model: Path, engine: str, **vllm: Any) -> dict[str, Any]:
    folder.mkdir()
    rollout = {"engine": engine, "kv_cache_gib": 0.1, "vllm": vllm}
    return bandit_settings(folder, model, steps=STEPS, rollout=rollout)


class Strike:
    """Sends a signal to the first server when the samples of half of the prompts of a step have arrived.

    The server is paused before it gets the other half, so that samples are outstanding, however fast it is.
    The last step begins when both servers are ready again.
    """

    def __init__(self, patch: pytest.MonkeyPatch, number: int) -> None:
        from rlhf.rollout.vllm.server_engine import VLLMServerEngine

        self.patch, self.number = patch, number
        self.submit = VLLMServerEngine.submit
        self.outstanding = 0
        self.struck = 0
        self.servers: set[int] = set()
        self.keepers: set[int] = set()
        strike = self
        patch.setattr(VLLMServerEngine, "submit", lambda engine, requests: strike.on(engine, requests))

    def on(self, engine: Any, requests: Sequence[RolloutRequest]) -> None:
        step = step_of(requests)
        if step == STEPS - 1:
            wait_for(lambda: len(engine._pool.ready) == 2)
        for replica in engine._pool.ready:
            self.servers.add(server_of(replica))
            self.keepers.add(replica._keeper.pid)
        if step == STRUCK_STEP:
            self.strike(engine, requests)
        else:
            self.submit(engine, requests)
        if step == STEPS - 1:
            assert len({sample.replica for sample in engine._samples.values()}) == 2

    def strike(self, engine: Any, requests: Sequence[RolloutRequest]) -> None:
        from rlhf.rollout.vllm.server_pool import Service

        victim = engine._pool.replicas[0]
        self.submit(engine, requests[: PROMPTS // 2])
        wait_for(lambda: engine._answers.qsize() == PROMPTS // 2 * GROUP)
        victim.call("POST", "/pause?mode=keep", timeout=PATIENCE)
        rest = requests[PROMPTS // 2 :]
        self.submit(engine, rest)
        later = {f"{request.prompt.id}/{i}" for request in rest for i in range(GROUP)}
        self.outstanding = sum(engine._samples[key].replica is victim for key in later)
        # all requests have been sent, and the paused server answers none
        wait_for(lambda: engine._senders._work_queue.empty())
        assert victim.call("GET", "/is_paused", timeout=PATIENCE)["is_paused"]
        # a short deadline for noticing the loss; the restart keeps the long one
        self.patch.setattr(engine, "_service", Service(replicas=2, deadline=20.0))
        self.struck = server_of(victim)
        os.killpg(self.struck, self.number)


def step_of(requests: Sequence[RolloutRequest]) -> int | None:
    """The step of these requests; None for the probe after an update."""
    label = requests[0].prompt.id.rpartition("@rollout/")[2]
    return int(label) // PROMPTS if label.isdigit() else None


def check_a_loss(
    strike: Strike,
    records: list[dict[str, Any]],
    undisturbed: list[dict[str, Any]],
    told: list[str],
    said: str,
) -> None:
    assert 0 < strike.outstanding < PROMPTS * GROUP
    assert [record["rollout/samples"] for record in records] == [PROMPTS * GROUP] * STEPS
    for record, other in zip(records, undisturbed, strict=True):
        assert math.isfinite(record["loss/policy"])
        assert record["mismatch/k3"] < 1e-6
        # equal, except for a draw that falls within the rounding of the logits
        assert record["reward/mean"] == pytest.approx(other["reward/mean"], abs=0.03)
    # metrics and log show the loss
    assert [record["rollout/servers_lost"] for record in records] == [0, 1, 0, 0]
    assert [record["rollout/servers"] for record in records][:: STEPS - 1] == [2, 2]
    assert records[STRUCK_STEP]["rollout/servers"] == 1
    assert said in told[0] and "samples go to 1 other servers" in told[0]
    assert "is back and has the current weights" in told[1]
    assert len(strike.servers) == 3 and strike.struck in strike.servers
    for server in strike.servers:
        assert not processes_of(server)
    assert not [keeper for keeper in strike.keepers if Path(f"/proc/{keeper}").exists()]
