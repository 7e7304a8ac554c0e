"""The prefetched batch of the next step: how stale it is, its checkpoint, and rewards beside the rollout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.checkpoints.store import load
from rlhf.collect.collector import Collected, Pending
from rlhf.collect.prefetch import Prefetch
from rlhf.collect.sampler import Sampler
from rlhf.collect.staleness import mask_stale_tokens
from rlhf.data.prompts import PromptDataset
from rlhf.distributed.world import World
from rlhf.metrics import Mean, Metrics, merge
from rlhf.rewards.scoring import Rewards
from rlhf.rollout.hf import HFEngine
from rlhf.types import Group, Prompt
from tests.support import ALONE, bandit_settings, group, metrics_of, train, trajectory


def batch(names: Sequence[str], kept: Sequence[str], position: int = 9) -> Collected:
    groups = [group(name, [1, 2], [[3, 4], [5]], [1.0, None]) for name in names]
    metrics: Metrics = {"reward/mean": Mean(float(len(names)), len(names))}
    return Collected([g for g in groups if g.prompt.id in kept], groups, position, metrics)


def dataset(names: Sequence[str]) -> PromptDataset:
    prompts = tuple(Prompt(name, (1, 2), name) for name in names)
    return PromptDataset(prompts, (), skipped=0, source=Path("train.jsonl"))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2), (2, 3)])
def test_a_batch_survives_a_checkpoint_on_any_number_of_ranks(before: int, after: int) -> None:
    names = [f"p{i}" for i in range(5)]
    everyones: list[dict[str, Any]] = []
    for rank in range(before):
        ahead = Prefetch(dataset(names), ALONE, 1)
        mine = names[rank::before]
        ahead.next(Pending(collected=batch(mine, [name for name in mine if name != "p2"])))
        everyones += ahead.state()["ranks"]
    saved = json.loads(json.dumps({"ranks": everyones}))

    groups: list[Group] = []
    kept: list[Group] = []
    metrics: list[Metrics] = []
    for rank in range(after):
        ahead = Prefetch(dataset(names), World(rank, after, torch.device("cpu")), 1)
        ahead.load(saved, {})
        collected = ahead.current(lambda: pytest.fail("it was sampled again"))
        assert collected.position == 9
        groups += collected.sampled
        kept += collected.groups
        metrics.append(collected.metrics)
    want = batch(names, [name for name in names if name != "p2"])
    assert sorted(groups, key=lambda g: g.prompt.id) == want.sampled
    assert sorted(kept, key=lambda g: g.prompt.id) == want.groups
    assert merge(metrics)["reward/mean"] == Mean(5.0, 5)


@pytest.mark.parametrize("after", [1, 2])
def test_completions_of_the_data_beside_the_rollouts_survive_it_too(after: int) -> None:
    names = ["p0", "p1", "p2"]
    plain = batch(names, names)
    data = trajectory([7, 8], 0.5, rollout_logprobs=None, versions=())
    joined = [replace(g, trajectories=(*g.trajectories, data)) for g in plain.groups]
    ahead = Prefetch(dataset(names), ALONE, 1)
    ahead.next(Pending(collected=replace(plain, groups=joined)))
    saved = json.loads(json.dumps(ahead.state()))
    found: list[Collected] = []
    for rank in range(after):
        other = Prefetch(dataset(names), World(rank, after, torch.device("cpu")), 1)
        other.load(saved, {})
        found.append(other.current(lambda: pytest.fail("it was sampled again")))
    assert sorted((g for c in found for g in c.groups), key=lambda g: g.prompt.id) == joined
    assert sorted((g for c in found for g in c.sampled), key=lambda g: g.prompt.id) == plain.sampled
    _, metrics = mask_stale_tokens(joined, version=1, bound=1)
    assert metrics["staleness/mean"].value == 1.0, "completions of the data have no staleness"


def test_every_step_but_the_first_learns_from_the_policy_of_the_step_before(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    train(bandit_settings(tmp_path, tiny_model_dir, steps=4, rollout={"ahead": 1}))
    assert [record["staleness/mean"] for record in metrics_of(tmp_path)] == [0.0, 1.0, 1.0, 1.0]
    state = load(tmp_path / "run" / "checkpoints" / "step_000004", device="cpu").state
    assert state["ahead"] == {"ranks": []}, "nothing is sampled that is never learned from"
    assert state["cursor"]["position"] == 4 * 8


def test_a_group_is_given_to_the_rewards_while_others_decode(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def noted(owner: type, name: str, event: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            events.append(event)
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, call)

    # this engine returns one group per poll
    noted(HFEngine, "poll", "decode")
    noted(Sampler, "_submit", "submit")
    noted(Rewards, "gather", "wait")
    train(bandit_settings(tmp_path, tiny_model_dir, steps=1, rollout={"engine": "hf"}))
    # before the step the engine's check of its cache and the probe of the weight sync, after it a probe
    at = events.index("submit") - 1
    assert set(events[:at]) == {"decode"} and at in (2, 3)
    assert events[at:] == [*["decode", "submit"] * 8, "wait", "decode"]
