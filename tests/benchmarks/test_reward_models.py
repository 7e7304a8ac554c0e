"""The comparison of reward models, on states that are made up: what it measures where the answer is known."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.reward_models import Listed, check, rank
from rlhf.data.pairs import Example
from rlhf.reward_model.frozen_states import States
from rlhf.types import Prompt


def lists(count: int) -> list[Listed]:
    """Answers whose states hold their parts and noise, of six countries by turns."""
    drawn, generator = random.Random(0), torch.Generator().manual_seed(0)
    made: list[Listed] = []
    for i in range(count):
        example = Example(Prompt(f"l:{i}", (1,), "p", {}), ("a",) * 5, ((1, 2),) * 5)
        # one answer has all parts, so that the answers differ
        parts = torch.tensor(
            [[1.0] * 3, *([float(drawn.random() < 0.5) for _ in range(3)] for _ in range(4))]
        )
        states = States(torch.zeros(8), torch.cat([parts, torch.randn(5, 5, generator=generator)], -1))
        made.append(Listed(example, states, parts, f"c{i % 6}", i % 3))
    return made


def test_both_heads_find_the_parts_with_settings_chosen_by_other_countries(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.reward_models.RATES", (1e-3, 3e-2))
    monkeypatch.setattr("benchmarks.reward_models.LISTS", 8)
    made = lists(48)
    found = rank(made[:36], made[36:], seed=0, steps=25)
    for name in ("pairs", "rankings"):
        assert found[name]["ndcg@1"] > 0.9
        assert (found[name]["lr"], found[name]["updates"]) == (3e-2, 25)


def test_what_was_asked_for_counts_more_than_the_other_parts():
    one = lists(3)[2]
    one = Listed(one.example, one.states, torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]), "c", asked=2)
    assert one.worth("asked").tolist() == [3.0, 2.0] and one.worth("rule").tolist() == [1.0, 2.0]


def test_a_claim_is_about_the_means_over_the_seeds():
    def seed(score: float, mean: float, rankings: float) -> dict[str, object]:
        accuracy = {
            "score": score,
            "mean of the objectives": mean,
            "correct": 0.6,
            "short": 0.7,
            "polite": 0.5,
        }
        ranked = {"pairs": {"ndcg@1": 0.8}, "rankings": {"ndcg@1": rankings}}
        return {"rule": {"accuracy": accuracy}, "asked": {"accuracy": accuracy}, "rank": ranked}

    # .8 on average: above the best objective and the mean of .75; rankings .8, as pairs
    assert all(check([seed(0.9, 0.7, 0.9), seed(0.7, 0.8, 0.7)]).values())
    lost = check([seed(0.8, 0.9, 0.7)])
    assert list(lost.values()) == [True, True, False, False]
