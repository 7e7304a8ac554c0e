"""An offline run on two ranks uses the same completions as on one rank, and learns the same from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.checkpoints.store import load
from tests.e2e.test_offline_runs import settings
from tests.e2e.test_twin_runs import two_adapters
from tests.faults.processes import launch
from tests.ranks import together
from tests.support import metrics_of, train

STEPS = 4
# metrics of the data that was used, of its rewards, and of the updates
TAKEN = ("rollout/groups", "length/mean", "reward/mean", "reward/std", "offline/kept_fraction")
LEARNED = ("loss/policy", "entropy", "grad_norm", "perplexity")


def run(folder: Path, model: Path, ranks: int, changes: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The metrics of a run, and its final weights."""
    folder.mkdir()
    # AdamW makes steps of the same size for a gradient that is only rounding error as for a large one
    learner = {"lr": 1e-3, "eps": 1e-3, "minibatches": 2}
    made = settings(folder, model, steps=STEPS, learner=learner, **changes)
    for ended in launch(made, folder / "log", ranks=ranks):
        assert ended.code == 0, ended.said
    saved = load(folder / "run" / "checkpoints" / f"step_{STEPS:06d}", device="cpu")
    return metrics_of(folder), dict(saved.tensors["policy.model"])


@pytest.mark.multi
@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": {"name": "awr"}, "data": {"sampling": "groups"}},
        {
            "algorithm": {"name": "a_lol"},
            "data": {"sampling": "priority"},
            "prompt_value": {"targets": "data"},
        },
    ],
    ids=["groups", "completions-by-their-advantage"],
)
def test_two_ranks_take_and_learn_what_one_does(
    tmp_path: Path, tiny_model_dir: Path, changes: dict[str, Any]
) -> None:
    one, weights = run(tmp_path / "one", tiny_model_dir, 1, changes)
    two, others = run(tmp_path / "two", tiny_model_dir, 2, changes)
    assert len(one) == len(two) == STEPS
    for alone, both in zip(one, two, strict=True):
        for name in TAKEN:
            assert both[name] == pytest.approx(alone[name], rel=1e-6), (alone["step"], name)
        for name in LEARNED:
            if name in alone:
                assert both[name] == pytest.approx(alone[name], rel=2e-3, abs=1e-5), (alone["step"], name)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=2e-5)


TWINS = ("pairs/loss", "pairs/margin", "grad_norm", "twin/slow_loss", "twin/slow_margin", "twin/gap")


@pytest.mark.multi
def test_two_adapters_on_two_ranks_learn_what_they_learn_on_one(tmp_path: Path, tiny_model_dir: Path) -> None:
    """And change places at the same step, which is decided by the losses of both ranks."""
    pytest.importorskip("peft")
    found: list[tuple[Any, dict[str, dict[str, Tensor]]]] = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        made = two_adapters(folder, tiny_model_dir)
        made["learner"] |= {"eps": 1e-2, "lr": 0.1}
        if ranks == 1:
            train(made)
        else:
            together(2, train, made)
        saved = load(folder / "run" / "checkpoints" / "step_000004", device="cpu")
        found.append(
            (metrics_of(folder), {k: dict(saved.tensors[k]) for k in ("policy.model", "twin.model")})
        )
    (one, weights), (two, others) = found
    assert [step["twin/swaps"] for step in one] == [step["twin/swaps"] for step in two] == [0, 1, 0, 0]
    for alone, both in zip(one, two, strict=True):
        for name in TWINS:
            assert both[name] == pytest.approx(alone[name], rel=2e-3, abs=1e-5), (alone["step"], name)
    for of_one, of_two in zip(weights.values(), others.values(), strict=True):
        assert of_one.keys() == of_two.keys()
        for name, weight in of_one.items():
            torch.testing.assert_close(of_two[name], weight, rtol=0, atol=1e-4)
