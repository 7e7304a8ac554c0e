"""Completions become scored groups: what every function says of each sample, weighted and added up.

A function that says None for a sample does not apply to it. A sample on which one fails (NaN, infinity, an
exception, a deadline, the end of its process), or to which none applies, has no reward: it is not learned
from, which is not the same as a reward of 0.

    handle = rewards.submit(prompts, completions, texts, trainer_state=state)     # the workers begin
    groups, metrics = handle.result()
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf.metrics import Max, Mean, Metrics
from rlhf.rewards.plugin import ALWAYS_GIVEN, RewardSpec, name_apart
from rlhf.rewards.workers.batch import Batch, BatchScores
from rlhf.rewards.workers.cache import ScoreCache
from rlhf.rewards.workers.pool import Call, Failure, Outcome, RewardError, WorkerPool
from rlhf.rewards.workers.values import Scores
from rlhf.types import Completion, Group, Prompt, Trajectory

logger = logging.getLogger(__name__)


class Scoring:
    """Samples on their way through the workers: `Rewards.submit` makes it, `result` waits for it."""

    def __init__(self, rewards: Rewards, batch: Batch, of: int) -> None:
        self.rewards, self.batch, self.of = rewards, batch, of
        self.verdicts = [
            BatchScores(batch, memory, pool.wait_ready().accepts)
            for pool, memory in zip(rewards.pools, rewards.memories, strict=True)
        ]
        self.left = sum(verdict.unanswered for verdict in self.verdicts)
        """Answers still to come, one a sample and function."""

    @property
    def done(self) -> bool:
        return self.left == 0

    def result(self) -> tuple[list[Group], Metrics]:
        """The groups as they were submitted. Raises RewardError, as `Rewards.gather` does."""
        return self.rewards.gather([self])


class Rewards:
    """Every reward function of a run, each with its workers.

    `columns` are those of the dataset, beside the prompt. Raises ValueError for a function that cannot be
    loaded, and for one that needs a column not among them.
    """

    def __init__(
        self, specs: Sequence[RewardSpec], columns: Iterable[str], *, max_failed_share: float = 0.1
    ) -> None:
        names = name_apart([spec.name or spec.path.rpartition(":")[2] for spec in specs])
        self.pools = [WorkerPool(name, spec) for name, spec in zip(names, specs, strict=True)]
        self.memories = [ScoreCache(spec.cache) if spec.cache else None for spec in specs]
        self.extra_weights: Mapping[str, float] = {}
        """By objective, beside the weights of the functions: constraints move them."""
        self._max_failed_share = max_failed_share
        self._owner: dict[str, WorkerPool] = {}
        self._logged: set[tuple[str, str]] = set()
        self._changed = threading.Condition()
        self._failed = [0] * len(specs)
        """Samples since the last `gather`, a function."""
        self._given_up: str | None = None
        weakref.finalize(self, _close, self.pools)
        try:
            for pool in self.pools:
                pool.start()
            for pool in self.pools:
                pool.wait_ready()
            self.check_columns(columns)
            for pool in self.pools:
                _check_cache(pool)
        except ValueError:
            self.close()
            raise

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises ValueError when a dataset with `columns` does not have what a function needs."""
        columns = tuple(columns)
        taken = sorted(set(columns).intersection(ALWAYS_GIVEN))
        if taken:
            raise ValueError(
                f"the dataset's column {taken[0]!r} has a name that reward functions get otherwise"
            )
        for pool in self.pools:
            pool.wait_ready().check_columns(pool.name, columns)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each objective seen so far: a function that returns dicts names them when called."""
        return {objective: self._weight(pool, objective) for objective, pool in self._owner.items()}

    @property
    def owners(self) -> dict[str, str]:
        """The function that each objective seen so far is of, by name."""
        return {objective: pool.name for objective, pool in self._owner.items()}

    def recall(self, owners: Mapping[str, str]) -> None:
        """Takes over what another rank, or a run before this one, has seen."""
        pools = {pool.name: pool for pool in self.pools}
        for objective, name in owners.items():
            if name in pools:
                self._owner.setdefault(objective, pools[name])

    def _weight(self, pool: WorkerPool, objective: str) -> float:
        given = pool.spec.weights.get(objective, pool.spec.weight)
        return given + self.extra_weights.get(objective, 0.0)

    @property
    def sees_whole_step(self) -> bool:
        """Whether a function is called once with all samples of a step: they are then submitted together."""
        return any(pool.spec.batch == "step" for pool in self.pools)

    def print_to(self, path: Path) -> None:
        """What functions print goes to this file, each line headed by the function's name.

        It is for reading alone: where it cannot be written, it is left out.
        """

        def write(name: str, text: str) -> None:
            with suppress(OSError), path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{name}: {line}\n" for line in text.splitlines()))

        for pool in self.pools:
            pool.log = partial(write, pool.name)

    def close(self) -> None:
        """Ends every worker. What is submitted later starts new ones."""
        _close(self.pools)

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
        *,
        trainer_state: Mapping[str, Any],
    ) -> tuple[list[Group], Metrics]:
        """`submit`, and the result."""
        return self.submit(prompts, completions, texts, trainer_state=trainer_state).result()

    def submit(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
        *,
        trainer_state: Mapping[str, Any],
        of: int | None = None,
    ) -> Scoring:
        """Has the completions of each prompt scored; `texts` are they decoded, without special tokens.

        `of`: the samples of the whole step that these belong to, when it is submitted in parts; how many may
        fail is a share of that. The parts are then given to `gather` together.

        Raises RewardError when a function cannot be run any more.
        """
        starts = [0]
        for group in completions:
            starts.append(starts[-1] + len(group))
        batch = Batch(
            [(prompt, range(a, b)) for prompt, (a, b) in zip(prompts, pairwise(starts), strict=True)],
            [prompt for prompt, group in zip(prompts, completions, strict=True) for _ in group],
            [completion for group in completions for completion in group],
            [text for group in texts for text in group],
        )
        scoring = Scoring(self, batch, len(batch.texts) if of is None else of)
        for number, pool in enumerate(self.pools):
            pool.submit(self._calls(scoring, number, trainer_state))
        return scoring

    def gather(self, scorings: Sequence[Scoring]) -> tuple[list[Group], Metrics]:
        """Waits for all of them; their groups, in order, and metrics over all.

        A trajectory's reward is the sum over its objectives of the weight times the value.

        Raises RewardError, which names the function, when one returns the wrong length or type, when it
        cannot be run any more, and when more than `max_failed_share` of the samples have no reward; that as
        soon as it is certain, with what is left not scored.
        """
        try:
            for scoring in scorings:
                self._wait(scoring)
            groups = [group for scoring in scorings for group in self._groups(scoring)]
            self._refuse_too_many_failures(groups, scorings)
        finally:
            with self._changed:
                self._failed = [0] * len(self.pools)
                self._given_up = None
        return groups, reward_metrics(groups) | self._timings(scorings)

    def _calls(self, scoring: Scoring, number: int, trainer_state: Mapping[str, Any]) -> list[Call]:
        pool, batch, wanted = self.pools[number], scoring.batch, scoring.verdicts[number].to_score
        size = pool.spec.batch
        if size == "group":
            cuts = [tuple(group) for _, group in batch.groups]
        elif size == "step":
            cuts = [tuple(wanted)]
        else:
            cuts = [tuple(wanted[first : first + size]) for first in range(0, len(wanted), size)]
        accepts = pool.wait_ready().accepts

        def arguments(samples: tuple[int, ...]) -> Mapping[str, Any]:
            return batch.arguments(samples, accepts, trainer_state)

        def finish(samples: tuple[int, ...], outcome: Outcome) -> None:
            self._finish(scoring, number, samples, outcome)

        def is_wanted() -> bool:
            return self._given_up is None

        return [Call(samples, arguments, finish, is_wanted) for samples in cuts if samples]

    def _finish(self, scoring: Scoring, number: int, samples: tuple[int, ...], outcome: Outcome) -> None:
        """Called by a worker's thread with the answer to one call."""
        name, failure = self.pools[number].name, outcome.failure
        with self._changed:
            answered, failed = scoring.verdicts[number].add(samples, outcome)
            scoring.left -= answered
            self._failed[number] += len(failed)
            if failure is not None and failure.kind == "wrong":
                self._given_up = f"reward function {name} {failure.message}"
            elif self._failed[number] > self._max_failed_share * scoring.of:
                self._given_up = ""
            # what stops the run is told where it stops
            first = failure is not None and (name, failure.kind) not in {*self._logged, (name, "wrong")}
            if failure is not None:
                self._logged.add((name, failure.kind))
            if scoring.done or self._given_up is not None:
                self._changed.notify_all()
        if first and failed:
            _log(name, scoring.batch.name(failed[0][0]), failed[0][1])

    def _wait(self, scoring: Scoring) -> None:
        with self._changed:
            while not scoring.done and self._given_up is None:
                self._changed.wait(1.0)
                for pool in self.pools:
                    pool.check()
            if self._given_up:
                raise RewardError(self._given_up)

    def _groups(self, scoring: Scoring) -> list[Group]:
        return [
            Group(prompt, tuple(self._trajectory(scoring, i) for i in group))
            for prompt, group in scoring.batch.groups
        ]

    def _trajectory(self, scoring: Scoring, sample: int) -> Trajectory:
        scored = [verdict.scores[sample] for verdict in scoring.verdicts]
        objectives: Scores = {}
        total = 0.0
        for pool, scores in zip(self.pools, scored, strict=True):
            for objective, value in (scores or {}).items():
                owner = self._owner.setdefault(objective, pool)
                if owner is not pool:
                    raise RewardError(
                        f"reward functions {owner.name} and {pool.name} both name an "
                        f"objective {objective!r}; rename one"
                    )
                objectives[objective] = value
                total += self._weight(pool, objective) * value
        complete = bool(objectives) and all(scores is not None for scores in scored)
        return Trajectory.single_turn(
            scoring.batch.completions[sample],
            text=scoring.batch.texts[sample],
            reward=total if complete else None,
            objectives=objectives,
        )

    def _refuse_too_many_failures(self, groups: Sequence[Group], scorings: Sequence[Scoring]) -> None:
        rewards = [trajectory.reward for group in groups for trajectory in group.trajectories]
        total = max([len(rewards), *(scoring.of for scoring in scorings)])
        without = rewards.count(None) - sum(scoring.left for scoring in scorings) // max(1, len(self.pools))
        if without <= self._max_failed_share * total:
            return
        blame = [
            self._blame(pool, [(s.batch, s.verdicts[number]) for s in scorings])
            for number, pool in enumerate(self.pools)
        ]
        raise RewardError(
            f"{without} of {total} samples have no reward, more than "
            f"max_failed_share = {self._max_failed_share}: "
            f"{'; '.join(filter(None, blame)) or 'no function applies to them'}"
        )

    def _blame(self, pool: WorkerPool, parts: Sequence[tuple[Batch, BatchScores]]) -> str:
        """For people. Empty when it failed on nothing."""
        failures = [(batch, *failure) for batch, verdict in parts for failure in verdict.failures]
        if not failures:
            return ""
        batch, sample, failure = failures[0]
        where = f"for {batch.name(sample)}, completion {batch.texts[sample]!r:.80}"
        return f"{pool.name} failed on {len(failures)} ({failure.message} {where})"

    def _timings(self, scorings: Sequence[Scoring]) -> Metrics:
        """Seconds a sample of each function, and the share of its samples that failed."""
        metrics: Metrics = {}
        for number, pool in enumerate(self.pools):
            verdicts = [scoring.verdicts[number] for scoring in scorings]
            seconds = sorted(s for verdict in verdicts for s in verdict.seconds)
            failures = [failure for verdict in verdicts for _, failure in verdict.failures]
            count = sum(len(verdict.scores) for verdict in verdicts)
            late = sum(failure.kind == "timeout" for failure in failures)
            if count:
                metrics[f"reward/failed/{pool.name}"] = Mean(len(failures), count)
                metrics[f"reward/timeout/{pool.name}"] = Mean(late, count)
            if count and self.memories[number] is not None:
                recalled = sum(verdict.recalled for verdict in verdicts)
                metrics[f"reward/recalled/{pool.name}"] = Mean(recalled, count)
            if not seconds:
                continue
            metrics[f"time/reward_p50/{pool.name}"] = Max(seconds[len(seconds) // 2])
            metrics[f"time/reward_p99/{pool.name}"] = Max(seconds[len(seconds) * 99 // 100])
        return metrics


def _check_cache(pool: WorkerPool) -> None:
    if not pool.spec.cache:
        return
    if not isinstance(pool.spec.batch, int):
        raise ValueError(
            f"reward function {pool.name} sees whole groups or steps, and may say something else of the same "
            "sample: cache must be 0"
        )
    if "trainer_state" in (pool.wait_ready().accepts or ()):
        raise ValueError(
            f"reward function {pool.name} asks for trainer_state, which changes from step to step: cache "
            "must be 0"
        )


def _close(pools: Sequence[WorkerPool]) -> None:
    for pool in pools:
        pool.close()


def _log(name: str, sample: str, failure: Failure) -> None:
    details = f"\n{failure.details.rstrip()}" if failure.details else ""
    logger.warning(
        "reward function %s failed on sample %s, which is not learned from: %s%s\n"
        "(said once; reward/failed/%s counts)",
        name,
        sample,
        failure.message,
        details,
        name,
    )


def reward_metrics(groups: Sequence[Group]) -> Metrics:
    """`reward/std` is the mean over groups of the standard deviation within the group."""
    samples = [trajectory for group in groups for trajectory in group.trajectories]
    if not samples:
        return {}
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    metrics: Metrics = {
        "reward/mean": Mean(math.fsum(rewards), len(rewards)),
        "reward/std": _spread([group.rewards for group in groups]),
        "reward/failed": Mean(len(samples) - len(rewards), len(samples)),
    }
    for objective in sorted({name for sample in samples for name in sample.objectives}):
        values = [
            [t.objectives[objective] for t in group.trajectories if objective in t.objectives]
            for group in groups
        ]
        flat = [value for group in values for value in group]
        metrics[f"reward/{objective}"] = Mean(math.fsum(flat), len(flat))
        metrics[f"reward/std/{objective}"] = _spread(values)
    return metrics


def _spread(groups: Sequence[Sequence[float]]) -> Mean:
    """The mean over groups of the standard deviation within the group."""
    spreads = [statistics.pstdev(values) for values in groups if values]
    return Mean(math.fsum(spreads), len(spreads))
