"""What an interrupted step saves of its experience, and under which names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from rlhf.learn.buffer import Buffer
from rlhf.tensors.candidates import Candidates
from rlhf.types import CriticTargets, Experience, PerceptionInputs
from tests.support import random_groups, unscored

NAMES = {
    "prompts",
    "prompt_lengths",
    "token_ids",
    "sequence",
    "positions",
    "turn",
    "group",
    "loss_mask",
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "advantages",
    "recorded",
    "correct",
    "numbers",
    "references",
    "critic.values",
    "critic.returns",
    "candidates.ids",
    "candidates.sizes",
    "perception.masked_logprobs",
    "perception.has_image",
    "perception.step",
}


def everything() -> Experience:
    plain = unscored(random_groups(0, sizes=[2, 3]))
    x = torch.rand(len(plain.token_ids))
    return replace(
        plain,
        old_logprobs=x,
        ref_logprobs=-x,
        recorded=x > 0.5,
        correct=torch.arange(5) > 2,
        numbers=torch.tensor([3, 1]),
        references=torch.tensor([1, 0]),
        critic=CriticTargets(values=x + 1, returns=x + 2),
        perception=PerceptionInputs(x + 3, x > 0.2, torch.tensor(7)),
        candidates=Candidates.of([[i, 98] for i in plain.token_ids.tolist()]),
    )


def same(got: Experience | None, expected: Experience) -> bool:
    buffers = Buffer(), Buffer()
    for buffer, experience in zip(buffers, (got, expected), strict=True):
        assert experience is not None
        buffer.fill(experience, {})
    one, other = (buffer.tensors()["experience"] for buffer in buffers)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_names_in_checkpoints_stay_and_those_of_earlier_ones_are_known() -> None:
    buffer, experience = Buffer(), everything()
    buffer.fill(experience, {})
    saved: Any = buffer.tensors()
    assert saved["experience"].keys() == NAMES
    earlier = {"candidates.ids": "kept.ids", "candidates.sizes": "kept.sizes", "correct": "right"}
    older: Any = {"experience": {earlier.get(name, name): t for name, t in saved["experience"].items()}}
    for tensors in (saved, older):
        again = Buffer()
        again.load(buffer.state(), tensors)
        assert same(again.experience, experience)
