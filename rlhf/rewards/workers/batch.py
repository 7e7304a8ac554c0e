"""The samples of one submission, and one reward function's scores and failures for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from rlhf.rewards.workers.cache import ScoreCache
from rlhf.rewards.workers.pool import Failure, Outcome
from rlhf.rewards.workers.return_values import Scores
from rlhf.rollout.episode import Episode, Sample
from rlhf.types import Prompt


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples to score: sample `i` belongs to `prompts[i]`; `groups` has each prompt with its samples."""

    groups: list[tuple[Prompt, range]]
    prompts: list[Prompt]
    completions: list[Sample]
    texts: list[str]

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Sample]],
        texts: Sequence[Sequence[str]],
    ) -> Batch:
        """The completions of each prompt, and their texts."""
        starts = [0]
        for group in completions:
            starts.append(starts[-1] + len(group))
        return cls(
            [(prompt, range(a, b)) for prompt, (a, b) in zip(prompts, pairwise(starts), strict=True)],
            [prompt for prompt, group in zip(prompts, completions, strict=True) for _ in group],
            [completion for group in completions for completion in group],
            [text for group in texts for text in group],
        )

    def arguments(
        self, samples: Sequence[int], wanted: Iterable[str] | None, trainer_state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The keyword arguments of a call with some of the samples: those `wanted`, None for all.

        `completions` is always one of them, because deadlines depend on the number of samples.
        """
        prompts = [self.prompts[i] for i in samples]
        given: dict[str, Any] = {
            **{name: [p.columns[name] for p in prompts] for name in prompts[0].columns},
            "prompts": [p.content if isinstance(p.content, str) else list(p.content) for p in prompts],
            "completion_ids": [list(self.completions[i].token_ids) for i in samples],
            "trainer_state": dict(trainer_state),
        }
        if self.has_episodes:
            given["environments"] = [self.environment(i) for i in samples]
        if wanted is not None and "images" in wanted and "images" not in given:
            # not given unless asked for by name: they are large
            given["images"] = [list(p.images or ()) for p in prompts]
        completions = [self.completion(i) for i in samples]
        kept = given if wanted is None else {name: given[name] for name in wanted if name in given}
        return {**kept, "completions": completions}

    def completion(self, sample: int) -> str | list[dict[str, Any]]:
        """A completion as functions get it: text, or the message of a chat where the prompt is a chat; all
        messages of an episode."""
        text, episode = self.texts[sample], self.completions[sample]
        if isinstance(episode, Episode):
            return [dict(message) for message in episode.messages]
        is_text = isinstance(self.prompts[sample].content, str)
        return text if is_text else [{"role": "assistant", "content": text}]

    @property
    def has_episodes(self) -> bool:
        """Whether an environment answered between turns."""
        return any(isinstance(completion, Episode) for completion in self.completions)

    def environment(self, sample: int) -> SimpleNamespace:
        """The public attributes of an episode's environment at its end, as functions get them."""
        episode = self.completions[sample]
        return SimpleNamespace(**episode.state) if isinstance(episode, Episode) else SimpleNamespace()

    def lost(self, sample: int) -> str | None:
        """Why the environment of a sample could not go on; None: nothing went wrong, or there is none."""
        episode = self.completions[sample]
        return episode.lost if isinstance(episode, Episode) else None

    def name(self, sample: int) -> str:
        """The name of a sample in messages: the id of its prompt and its index in the group."""
        return f"{self.prompts[sample].id}#{self.completions[sample].index}"


def lost_episodes(batch: Batch) -> str:
    """What an error says of episodes that could not go on; empty if there are none."""
    lost = [(i, why) for i in range(len(batch.texts)) if (why := batch.lost(i)) is not None]
    if not lost:
        return ""
    first, why = lost[0]
    return f"{len(lost)} episodes were lost ({batch.name(first)}: {why})"


class BatchScores:
    """Scores and failures of one function for every sample of a submission, filled in as calls return."""

    def __init__(self, batch: Batch, cache: ScoreCache | None, accepts: Iterable[str] | None) -> None:
        """`cache`: earlier scores, for a deterministic function. `accepts`: its arguments, None for any."""
        count = len(batch.texts)
        self.cache = cache
        self.scores: list[Scores | None] = [None] * count
        self.seconds: list[float] = []
        self.failures: list[tuple[int, Failure]] = []
        """Samples that got no scores, each with its failure."""
        self.logged: dict[str, list[float]] = {}
        """What calls logged with `log_metric`, by name."""
        self.extra: list[dict[str, str]] = [{} for _ in range(count)]
        """What calls logged with `log_extra` for each sample: a text by column."""
        self.lost = sum(batch.lost(i) is not None for i in range(count))
        """Samples that no function is called with, because their environment failed."""
        self.to_score: Sequence[int] = [i for i in range(count) if batch.lost(i) is None]
        """Samples that the function must be called with: not lost, not cached, no duplicates."""
        self._duplicates: dict[int, list[int]] = {}
        """For a sample in `to_score`, the later samples that are equal to it."""
        self._keys: list[bytes] = []
        if cache is not None:
            self._keys = [cache.key(batch.arguments((i,), accepts, {})) for i in range(count)]
            self.to_score = self._look_up(cache)

    @property
    def cached(self) -> int:
        """Number of samples that need no call: cached, or equal to another sample."""
        return len(self.scores) - self.lost - len(self.to_score)

    @property
    def unanswered(self) -> int:
        """Number of samples whose scores are not known before any call is made."""
        return len(self.to_score) + sum(map(len, self._duplicates.values()))

    def _look_up(self, cache: ScoreCache) -> list[int]:
        """Fills in cached scores; returns the samples to score, the first of each set of equal ones."""
        first: dict[bytes, int] = {}
        for i in self.to_score:
            key = self._keys[i]
            known = cache.get(key)
            if known is not None:
                self.scores[i] = known
            elif key in first:
                self._duplicates.setdefault(first[key], []).append(i)
            else:
                first[key] = i
        return list(first.values())

    def add(self, samples: Sequence[int], outcome: Outcome) -> tuple[int, list[tuple[int, Failure]]]:
        """Enters the outcome of a call. Returns the number of samples it answers, and the new failures."""
        answered = 0
        failed: list[tuple[int, Failure]] = []
        for first, scores in zip(samples, outcome.scores, strict=True):
            for i in (first, *self._duplicates.get(first, ())):
                self.scores[i] = scores
                answered += 1
                if scores is None:
                    assert outcome.failure is not None
                    failed.append((i, outcome.failure))
            if self.cache is not None and scores is not None:
                self.cache.put(self._keys[first], scores)
        for column, texts in outcome.extra.items():
            for first, text in zip(samples, texts, strict=True):
                for i in (first, *self._duplicates.get(first, ())):
                    self.extra[i][column] = text
        for name, values in outcome.metrics.items():
            self.logged.setdefault(name, []).extend(values)
        self.seconds += [outcome.seconds / len(samples)] * len(samples)
        self.failures += failed
        return answered, failed
