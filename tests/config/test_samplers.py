"""Settings of samplers and of the iterate: what they make, and every combination that is refused."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.config.load import make_config
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.types import Source
from tests.config.test_config import settings

BOTH = [{"source": "policy", "n": 1}, {"source": "reference", "n": 2}]


def config(**changes: Any) -> Config:
    return make_config(settings(algorithm={"name": "dpo"}) | changes)


def test_a_group_is_the_sum_of_its_samplers():
    made = config(rollout={"samplers": BOTH})
    assert made.rollout.group_size == 3
    assert made.rollout.sources == {Source.POLICY, Source.REFERENCE}
    assert config().rollout.sources == {Source.POLICY}
    # the file that a run writes gives the same settings again
    assert make_config(made.model_dump(mode="json")).rollout == made.rollout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout": {"samplers": BOTH, "group_size": 8}},
            "samplers make 3 completions of a prompt, but group_size is 8",
        ),
        ({"rollout": {"samplers": [{"source": "mixture"}]}}, "for example {source: mixture, mixture: 0.125}"),
        (
            {"rollout": {"samplers": [{"source": "policy", "mixture": 0.5}]}},
            "got source: policy, mixture: 0.5",
        ),
        ({"rollout": {"samplers": [{"source": "teacher"}]}}, "rollout.samplers.0.source"),
        (
            {"rollout": {"samplers": BOTH}, "algorithm": "grpo"},
            "rollout.samplers has completions of the reference",
        ),
        (
            {"rollout": {"samplers": [{"n": 4, "temperature": 0.5}]}, "algorithm": "grpo"},
            "completions of the policy at another temperature",
        ),
        (
            {"rollout": {"samplers": BOTH}, "distributed": {"mode": "sharded"}},
            "takes whole weights on each rank, but distributed.mode is sharded",
        ),
        (
            {"rollout": {"samplers": BOTH}, "data": {"train": "t.jsonl", "mode": "offline"}},
            "rollout.samplers is for rollouts, but data.mode = offline has none",
        ),
        (
            {"rollout": {"samplers": BOTH}, "budget": {"rule": "knapsack", "prior": 1}},
            "and so does budget.rule = knapsack",
        ),
        (
            {"rollout": {"samplers": [{"source": "iterate", "n": 2}]}},
            "samples from the iterate, but iteration.steps is 0",
        ),
        (
            {"algorithm": "sppo"},
            "sppo compares with the policy of the last iteration, but iteration.steps is 0",
        ),
        ({"iteration": {"steps": 5}}, "iteration.steps is 5, but nothing uses the iterate"),
        ({"iteration": {"reference": "iterate"}}, "iteration.reference is iterate, but iteration.steps is 0"),
        (
            {"iteration": {"reference": "iterate", "steps": 5}, "model": {"path": "m", "reference": "other"}},
            "model.reference is other, but with iteration.reference = iterate the reference is the iterate",
        ),
        (
            {
                "algorithm": "nash_md",
                "rollout": {"samplers": [{"source": "mixture", "mixture": 0.5, "n": 2}]},
            },
            "nash_md learns from the policy's own samples at rollout.temperature",
        ),
        (
            {"algorithm": "hypo", "rollout": {"samplers": [{"n": 4, "temperature": 0.5}]}},
            "hypo learns from the policy's own samples at rollout.temperature",
        ),
        ({"algorithm": "nash_md", "rollout": {"group_size": 1}}, "but rollout.group_size is 1"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_set(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert message in str(caught.value)


def test_data_of_pairs_beside_rollouts_is_compared_by_its_own_labels_or_by_rewards():
    data = {"train": "t.jsonl", "mode": "offline_to_online", "mix": True}
    with pytest.raises(ConfigError, match=r"set data\.reward_column to null"):
        config(data=data)
    assert config(data=data | {"reward_column": None}).data.mix
    assert config(data=data, pairs={"rule": "of_data"}).data.mix
