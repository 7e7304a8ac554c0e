"""The records of RUN/samples.jsonl: a few groups of each step, with rewards, advantages and entropies.

Each line is an object for one group:

    {"step": 3, "prompt_id": "train.jsonl:7", "prompt": "What is 3 + 5?", "completions": [
        {"text": "8", "reward": 1.0, "objectives": {"right": 1.0}, "finish_reason": "stop", "num_tokens": 2,
         "tokens": ["8", "<|im_end|>"], "advantage": 0.7, "entropy": [1.2, 0.1]}, ...]}

`advantage` is one number where all tokens of a completion have the same advantage, else a list with one
number for each token. `entropy` (nats, whole vocabulary) is from the forward pass of the update. Both are 0
for a token outside the loss mask, as what a tool said. A completion that was not learned from has neither.
`entropy` is also absent where the group was skipped (all its advantages were 0). A completion that the policy
did not sample has its `source`: `reference`, `iterate`, `mixture` or `data`. Where reward functions have
logged values of a completion (`log_extra`), it has them under `logged`, as `{"right/parsed": 8}`. An episode
of several turns has its `messages`, and `parts`, its tokens in order as `[number of tokens, 1 if the policy
learns from them, else 0]`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor

from rlhf.torch_typed import numbers
from rlhf.types import Experience, Group, Source, Trajectory, is_learnable

DIGITS = 4


class TokenTexts:
    """Turns token ids into the text of each token, special tokens included."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        for token_id in token_ids:
            if token_id not in self.known:
                self.known[token_id] = self.tokenizer.decode([token_id])
        return [self.known[token_id] for token_id in token_ids]


@dataclass(frozen=True, slots=True)
class ShownGroups:
    """The groups of a step that are recorded, and the experience that begins with their tokens."""

    step: int
    groups: tuple[Group, ...]
    experience: Experience | None

    def records(self, texts: TokenTexts | None, entropy: Tensor | None) -> list[dict[str, Any]]:
        """One object for each group. `entropy` `[N]`: of the experience's tokens, NaN where not measured."""
        places = self._places()
        return [
            {
                "step": self.step,
                "prompt_id": group.prompt.id,
                "prompt": _content(group),
                "completions": [
                    _completion(t, texts) | self._measured(places.get(id(t)), entropy)
                    for t in group.trajectories
                ],
            }
            for group in self.groups
        ]

    def _places(self) -> dict[int, slice]:
        """The slice of the experience's tokens of each trajectory that is learned from, by its `id()`."""
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
        return found if entropy is None else found | _entropies(entropy[place])


def with_entropy(lines: Sequence[str], step: int, entropy: Tensor) -> list[str]:
    """Lines of samples.jsonl, those of `step` with `entropy` `[N]` of the experience that they begin."""
    written: list[str] = []
    start = 0
    for line in lines:
        record: dict[str, Any] = json.loads(line) if line else {}
        if record.get("step") == step:
            for completion in record["completions"]:
                # a completion that was not learned from has no advantage, and no tokens in the experience
                if "advantage" in completion and "tokens" in completion:
                    end = start + len(completion["tokens"])
                    completion |= _entropies(entropy[start:end])
                    start = end
        written.append(to_line(record) if record.get("step") == step else line)
    return written


def to_line(entry: Mapping[str, Any]) -> str:
    """An object as a line of a .jsonl file, without the line end."""
    return json.dumps(entry, ensure_ascii=False, allow_nan=False, default=str)


def _entropies(entropy: Tensor) -> dict[str, Any]:
    """The entry of a completion; none where some token was not measured."""
    nats = [round(x, DIGITS) for x in numbers(entropy)]
    return {} if any(map(math.isnan, nats)) else {"entropy": nats}


def _completion(trajectory: Trajectory, texts: TokenTexts | None) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": trajectory.text,
        "reward": finite(trajectory.reward),
        "objectives": {name: finite(value) for name, value in trajectory.objectives.items()},
        "finish_reason": str(trajectory.finish_reason),
        "num_tokens": sum(trajectory.loss_mask),
    }
    if trajectory.source != Source.POLICY:
        record["source"] = str(trajectory.source)
    if trajectory.messages:
        parts = [[len(list(run)), int(own)] for own, run in groupby(trajectory.loss_mask)]
        record |= {"messages": list(trajectory.messages), "parts": parts}
    if trajectory.step_rewards:
        record["step_rewards"] = [[token, finite(reward)] for token, reward in trajectory.step_rewards]
    if trajectory.logged:
        record["logged"] = {name: _value(text) for name, text in trajectory.logged.items()}
    return record if texts is None else record | {"tokens": texts(trajectory.token_ids)}


def _value(text: str) -> Any:
    """What a function logged: JSON, unless it was too long or of another kind."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _content(group: Group) -> Any:
    content = group.prompt.content
    return content if isinstance(content, str) else list(content)


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
