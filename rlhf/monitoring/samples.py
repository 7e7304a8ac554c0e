"""RUN/samples.jsonl: a few groups a step with all that was made of them, one object a group:

    {"step": 3, "prompt_id": "train.jsonl:7", "prompt": "What is 3 + 5?", "completions": [
        {"text": "8", "reward": 1.0, "objectives": {"right": 1.0}, "finish_reason": "stop", "num_tokens": 2,
         "tokens": ["8", "<|im_end|>"], "advantage": 0.7, "entropy": [1.2, 0.1]}, ...]}

`advantage` is one number where all tokens of a completion have the same, else one a token; `entropy` is that
of the whole vocabulary in the pass that the policy learned from, in nats. Both are absent where the
completion was not learned from, and `entropy` where its group taught nothing, so that no pass was made, or
where the run was stopped between the updates of the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf.torch_typed import numbers
from rlhf.types import Experience, Group, Trajectory, is_learnable

DIGITS = 4


class TokenTexts:
    """The text of single tokens, special ones included."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        for token_id in token_ids:
            if token_id not in self.known:
                self.known[token_id] = self.tokenizer.decode([token_id])
        return [self.known[token_id] for token_id in token_ids]


@dataclass(frozen=True, slots=True)
class Shown:
    """The first groups of a step, and the experience in which they come first."""

    step: int
    groups: tuple[Group, ...]
    experience: Experience | None

    def records(self, texts: TokenTexts | None, entropy: Tensor | None) -> list[dict[str, Any]]:
        """`entropy` `[N]` of the experience's tokens, NaN where it was not measured."""
        places = self._places()
        return [
            {
                "step": self.step,
                "prompt_id": group.prompt.id,
                "prompt": _content(group),
                "completions": [
                    _said(t, texts) | self._measured(places.get(id(t)), entropy) for t in group.trajectories
                ],
            }
            for group in self.groups
        ]

    def _places(self) -> dict[int, slice]:
        """Where the tokens of each trajectory that is learned from stand in the experience."""
        places: dict[int, slice] = {}
        start = 0
        for trajectory in (t for group in self.groups for t in group.trajectories if is_learnable(t)):
            places[id(trajectory)] = slice(start, start + len(trajectory.token_ids))
            start += len(trajectory.token_ids)
        return places

    def _measured(self, place: slice | None, entropy: Tensor | None) -> dict[str, Any]:
        if place is None or self.experience is None:
            return {}
        advantages = [round(x, DIGITS) for x in numbers(self.experience.advantages[place])]
        found: dict[str, Any] = {"advantage": advantages[0] if len(set(advantages)) == 1 else advantages}
        if entropy is not None:
            nats = [round(x, DIGITS) for x in numbers(entropy[place])]
            if not any(map(math.isnan, nats)):
                found["entropy"] = nats
        return found


def _said(trajectory: Trajectory, texts: TokenTexts | None) -> dict[str, Any]:
    said: dict[str, Any] = {
        "text": trajectory.text,
        "reward": finite(trajectory.reward),
        "objectives": {name: finite(value) for name, value in trajectory.objectives.items()},
        "finish_reason": str(trajectory.finish_reason),
        "num_tokens": sum(trajectory.loss_mask),
    }
    return said if texts is None else said | {"tokens": texts(trajectory.token_ids)}


def _content(group: Group) -> Any:
    content = group.prompt.content
    return content if isinstance(content, str) else list(content)


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
