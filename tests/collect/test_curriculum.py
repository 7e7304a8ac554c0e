"""The curriculum: draws follow the measured success and the step, on all ranks alike, and resume exactly."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.algos.budget import SuccessTracker
from rlhf.collect.collector import Collector
from rlhf.collect.curriculum import PromptOrder
from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.data.identity import identity
from rlhf.data.prompts import PromptDataset
from rlhf.distributed.world import World
from rlhf.types import Prompt
from tests.config.test_config import settings
from tests.support import bandit_settings, changed, metrics_of, train, train_interrupted, without_clocks


def order_of(outcomes: list[list[float]]) -> PromptOrder:
    """The order of 11 steps, with a record of the outcomes of each prompt."""
    prompts = tuple(Prompt(f"p{i}", (3, i), f"{i}") for i in range(len(outcomes)))
    tracker = SuccessTracker()
    for prompt, known in zip(prompts, outcomes, strict=True):
        tracker.update(identity(prompt), known)
    data = {"train": "train.jsonl", "curriculum": "easy_to_hard"}
    config = make_config(settings(steps=11, data=data))
    return PromptOrder(config, PromptDataset(prompts, (), skipped=0, source=Path("t")), tracker)


@pytest.mark.parametrize(
    ("step", "shares"),
    [
        # rates 3/4, 1/4 and 1/2, target 1: exp(-0.5), exp(-4.5), exp(-2) = 0.6065, 0.0111, 0.1353
        (0, [0.8055, 0.0148, 0.1797]),
        # target 1/2: exp(-0.5), exp(-0.5), 1
        (5, [0.2741, 0.2741, 0.4519]),
        # target 0: exp(-4.5), exp(-0.5), exp(-2)
        (10, [0.0148, 0.8055, 0.1797]),
    ],
)
def test_a_prompt_comes_with_the_probability_of_its_success(step: int, shares: list[float]):
    order = order_of([[1.0] * 5 + [0.0], [0.0] * 5 + [1.0], []])
    drawn = Counter(order(position, 1, step)[0].id for position in range(4000))
    # four standard deviations of a share of 4000 draws are at most 0.032
    assert [drawn[f"p{i}"] / 4000 for i in range(3)] == pytest.approx(shares, abs=0.032)


def test_a_step_draws_each_prompt_once_until_there_are_no_more():
    order = order_of([[]] * 5)
    first = order(3, 5, 2)
    assert len({p.id for p in first}) == 5
    assert order(3, 12, 2) == first + first + first[:2]


def test_ranks_share_the_draws_of_a_step():
    order, wanted = order_of([[float(i % 2)] for i in range(9)]), [3, 2]
    parts: list[Prompt] = []
    for rank in range(2):
        world = World(rank, 2, torch.device("cpu"))
        collector = Collector.__new__(Collector)
        collector.order, collector.world = order, world
        draws, prompts, position = collector._draws(7, wanted, 4)  # pyright: ignore[reportPrivateUsage]
        assert (len(draws), position) == (wanted[rank], 12)
        parts += prompts
    assert parts == order(7, 5, 4)


REWARD = """
def mostly_even(prompts, completions, **_):
    sums = [sum(map(ord, text)) for text in completions]
    easy = [int(p.split()[1][:-1]) < 4 for p in prompts]
    return [float((s % 8 != 0) == e) for s, e in zip(sums, easy)]
"""


def test_it_goes_from_easy_to_hard_with_a_knapsack_budget_and_resumes_exactly(
    tmp_path: Path, tiny_model_dir: Path
):
    """Four prompts are solved 7 times out of 8, four others once."""
    runs: dict[str, dict[str, Any]] = {}
    for name in ("whole", "stopped"):
        folder = tmp_path / name
        folder.mkdir()
        tree = bandit_settings(folder, tiny_model_dir, steps=16)
        (folder / "reward.py").write_text(REWARD)
        (folder / "train.jsonl").write_text("".join(f'{{"prompt": "say {i}:"}}\n' for i in range(8)))
        tree["reward"] = {"functions": [{"path": f"{folder}/reward.py:mostly_even"}]}
        tree["data"]["curriculum"] = "easy_to_hard"
        runs[name] = changed(
            tree,
            {
                "rollout": {"prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 4, "ahead": 1},
                "budget": {"rule": "knapsack", "prior": 1.0, "high": 8},
                "learner": {"lr": 1e-6},
                "monitor": {"samples_per_step": 4},
            },
        )
    train(runs["whole"])
    train_interrupted(runs["stopped"], after=5)
    train(changed(runs["stopped"], {"checkpoint": {"resume": "auto"}}))
    records = metrics_of(tmp_path / "whole")
    assert without_clocks(metrics_of(tmp_path / "stopped")) == without_clocks(records)
    # the knapsack divides the 4 x 4 completions of each step
    assert {step["rollout/samples"] for step in records} == {16}
    assert max(step["budget/largest"] for step in records) > 4
    shown = [json.loads(line) for line in (tmp_path / "whole/run/samples.jsonl").read_text().splitlines()]
    easy = [int(group["prompt"].split()[1][:-1]) < 4 for group in shown]
    # of the 20 draws of steps 5 to 9, and of the last five
    assert sum(easy[16:36]) >= 12 and sum(easy[-20:]) <= 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"mode": "offline"}, "algorithm": {"name": "sft"}}, "with data.mode = offline there are"),
        ({"algorithm": {"name": "distill"}, "reward": {}}, "nothing says that of a single sample"),
        ({"reward": {"preference": {"path": "a:b"}}}, "nothing says that of a single sample"),
    ],
)
def test_it_needs_samples_that_are_right_or_wrong(changes: dict[str, Any], message: str):
    base = settings()
    base["data"]["curriculum"] = "easy_to_hard"
    base["model"]["reference"] = "teacher"
    if "reward" in changes:
        base["reward"] = {}
    with pytest.raises(ConfigError, match=message):
        make_config(changed(base, changes))
