"""Samples on their way through the reward functions, and what each function said of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.rewards.workers.cache import ScoreCache
from rlhf.rewards.workers.pool import Failure, Outcome
from rlhf.rewards.workers.values import Scores
from rlhf.types import Completion, Prompt


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples end to end: sample `i` belongs to `prompts[i]`; `groups` has the samples of each prompt."""

    groups: list[tuple[Prompt, range]]
    prompts: list[Prompt]
    completions: list[Completion]
    texts: list[str]

    def arguments(
        self, samples: Sequence[int], wanted: Iterable[str] | None, trainer_state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What a call with some of the samples gets. `completions` is always among it."""
        prompts = [self.prompts[i] for i in samples]
        chats = [not isinstance(p.content, str) for p in prompts]
        given: dict[str, Any] = {
            **{name: [p.columns[name] for p in prompts] for name in prompts[0].columns},
            "prompts": [p.content if isinstance(p.content, str) else list(p.content) for p in prompts],
            "completion_ids": [list(self.completions[i].token_ids) for i in samples],
            "trainer_state": dict(trainer_state),
        }
        completions = [
            [{"role": "assistant", "content": self.texts[i]}] if chat else self.texts[i]
            for i, chat in zip(samples, chats, strict=True)
        ]
        kept = given if wanted is None else {name: given[name] for name in wanted if name in given}
        return {**kept, "completions": completions}

    def name(self, sample: int) -> str:
        """For people: the prompt's id and the place in its group."""
        return f"{self.prompts[sample].id}#{self.completions[sample].index}"


class BatchScores:
    """What one function said of every sample of a submission, filled in as answers come."""

    def __init__(self, batch: Batch, memory: ScoreCache | None, accepts: Iterable[str] | None) -> None:
        """`memory` of a function that says the same of the same sample."""
        count = len(batch.texts)
        self.memory = memory
        self.scores: list[Scores | None] = [None] * count
        self.seconds: list[float] = []
        self.failures: list[tuple[int, Failure]] = []
        """Samples that got no scores, each with the reason."""
        self.to_score: Sequence[int] = range(count)
        """Samples that the function has to be called with."""
        self._like: dict[int, list[int]] = {}
        """Of these, those with others like them."""
        self._keys: list[bytes] = []
        if memory is not None:
            self._keys = [memory.key(batch.arguments((i,), accepts, {})) for i in range(count)]
            self.to_score = self._recall(memory)

    @property
    def recalled(self) -> int:
        """Samples that cost no call."""
        return len(self.scores) - len(self.to_score)

    @property
    def unanswered(self) -> int:
        """Samples whose scores are still to come, before any call is made."""
        return len(self.to_score) + sum(map(len, self._like.values()))

    def _recall(self, memory: ScoreCache) -> list[int]:
        first: dict[bytes, int] = {}
        for i, key in enumerate(self._keys):
            known = memory.get(key)
            if known is not None:
                self.scores[i] = known
            elif key in first:
                self._like.setdefault(first[key], []).append(i)
            else:
                first[key] = i
        return list(first.values())

    def add(self, samples: Sequence[int], outcome: Outcome) -> tuple[int, list[tuple[int, Failure]]]:
        """Returns how many samples have their answer by it, and the new failures."""
        answered = 0
        failed: list[tuple[int, Failure]] = []
        for first, scores in zip(samples, outcome.scores, strict=True):
            for i in (first, *self._like.get(first, ())):
                self.scores[i] = scores
                answered += 1
                if scores is None:
                    assert outcome.failure is not None
                    failed.append((i, outcome.failure))
            if self.memory is not None and scores is not None:
                self.memory.put(self._keys[first], scores)
        self.seconds += [outcome.seconds / len(samples)] * len(samples)
        self.failures += failed
        return answered, failed
