"""Scores completions: has every reward function score each sample, and adds up the weighted objectives.

A function that returns None for a sample does not apply to it. A sample has no reward when a function fails
on it (NaN, infinity, an exception, a missed deadline, the end of its process) or when no function applies to
it. Such a sample is not learned from, which is not the same as a reward of 0.

    handle = rewards.submit(prompts, completions, texts, trainer_state=state)     # workers start scoring
    groups, metrics = handle.result()
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.metrics import Metrics, Sum
from rlhf.rewards.measures import TAKEN, function_metrics, reward_metrics, taken
from rlhf.rewards.plugin import RewardSpec, name_apart
from rlhf.rewards.signature import ALWAYS_GIVEN
from rlhf.rewards.steps import Decode, Scored, step_rewards
from rlhf.rewards.workers.batch import Batch, BatchScores, lost_episodes
from rlhf.rewards.workers.cache import ScoreCache
from rlhf.rewards.workers.pool import Call, Outcome, RewardError, WorkerPool, print_to
from rlhf.rewards.workers.return_values import Scores, summed
from rlhf.rollout.episode import Episode, Sample, trajectory_of, turn_metrics
from rlhf.types import Group, Prompt, Trajectory

ENVIRONMENT = "environment "
"""Before the name of an environment where an objective's owner is named."""


class Scoring:
    """Handle of samples that are being scored: `Rewards.submit` returns it, `result` waits for the scores."""

    def __init__(self, rewards: Rewards, batch: Batch, step_samples: int) -> None:
        self.rewards, self.batch, self.step_samples = rewards, batch, step_samples
        self.by_function = [
            BatchScores(batch, cache, pool.wait_ready().accepts)
            for pool, cache in zip(rewards.pools, rewards.caches, strict=True)
        ]
        """Scores and failures of each reward function."""
        self.unanswered = sum(scores.unanswered for scores in self.by_function)
        """Scores still to come, counted once per sample and function."""
        self.judging: Scoring | None = None
        """The duels of the samples, scored by a judge; None: none are asked (rlhf/rewards/judges)."""

    @property
    def done(self) -> bool:
        return self.unanswered == 0

    def wait(self) -> None:
        """Waits for the scores, whoever failed. Raises RewardError when a function returns the wrong type."""
        self.rewards.wait(self)

    def result(self) -> tuple[list[Group], Metrics]:
        """The scored groups, in the order submitted, and metrics; raises what `Rewards.gather` raises."""
        return self.rewards.gather([self])


class Rewards:
    """All reward functions of a run, each with its worker processes.

    `columns`: names of the dataset's columns other than the prompt. Raises ValueError when a function cannot
    be loaded or needs a column that is not among them.
    """

    def __init__(
        self, specs: Sequence[RewardSpec], columns: Iterable[str], *, max_failed_share: float = 0.1
    ) -> None:
        names = name_apart([spec.name or spec.path.rpartition(":")[2] for spec in specs])
        self.pools = [WorkerPool(name, spec) for name, spec in zip(names, specs, strict=True)]
        self.caches = [ScoreCache(spec.cache) if spec.cache else None for spec in specs]
        self.extra_weights: Mapping[str, float] = {}
        """By objective, added to the weights in the settings; constraints change them from step to step."""
        self._max_failed_share = max_failed_share
        self._owner: dict[str, str] = {}
        """By objective: the name of the function that gave it, or `environment NAME`."""
        self._logged: set[tuple[str, str]] = set()
        self._changed = threading.Condition()
        self._failed = [0] * len(specs)
        """Failed samples of each function since the last `gather`."""
        self._given_up: str | None = None
        """Why scoring is given up, empty if the failures say it; None: it is not given up."""
        self.environment_rewards = False
        """Whether environments give rewards, so that an episode without any has none."""
        self.max_steps: int | None = None
        """Number of steps of the run, which `trainer_state` says; None: outside a run."""
        self.dropped_tokens: frozenset[int] | None = None
        """Ids of the tokens that completions are decoded without; None: all special tokens."""
        self.decode: Decode | None = None
        """Finds the tokens at which steps end; None: no function gives rewards to steps."""
        self.steps_per_epoch = 1.0
        """Number of steps of one pass over the data, for `trainer_state.epoch`."""
        weakref.finalize(self, _close, self.pools)
        try:
            for pool in self.pools:
                if pool.name in TAKEN:
                    raise ValueError(f"{taken(pool.name)}: set the function's name")
                pool.start()
            for pool in self.pools:
                pool.wait_ready()
            self.check_columns(columns)
            for pool in self.pools:
                pool.check_cache()
        except ValueError:
            self.close()
            raise

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises ValueError when a function needs a column that a dataset with `columns` does not have."""
        columns = tuple(columns)
        taken = sorted(set(columns).intersection(ALWAYS_GIVEN))
        if taken:
            raise ValueError(
                f"the dataset's column {taken[0]!r} has the name of an argument that the trainer passes to "
                "reward functions; rename the column"
            )
        for pool in self.pools:
            pool.wait_ready().check_columns(pool.called, columns)

    def cautions(self, columns: Iterable[str]) -> Iterator[str]:
        """What is allowed but hardly ever meant, of each function on a dataset with `columns`."""
        columns = tuple(columns)
        for pool in self.pools:
            yield from pool.wait_ready().cautions(pool.called, columns, pool.spec.batch)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each objective seen so far (objectives of returned dicts are known only then)."""
        return {objective: self._weight(owner, objective) for objective, owner in self._owner.items()}

    @property
    def owners(self) -> dict[str, str]:
        """Name of the function that gave it, for each objective seen so far."""
        return dict(self._owner)

    def add_owners(self, owners: Mapping[str, str]) -> None:
        """Adds the objectives that another rank, or the run before it was resumed, has seen."""
        known = {pool.name for pool in self.pools}
        for objective, name in owners.items():
            if name in known or name.startswith(ENVIRONMENT):
                self._owner.setdefault(objective, name)

    def _weight(self, owner: str, objective: str) -> float:
        """That of the settings, 1 for what an environment gives, and what constraints add to it."""
        spec = next((pool.spec for pool in self.pools if pool.name == owner), None)
        configured = 1.0 if spec is None else spec.weights.get(objective, spec.weight)
        return configured + self.extra_weights.get(objective, 0.0)

    @property
    def all_pools(self) -> list[WorkerPool]:
        """Those of all reward functions and of the judge."""
        return self.pools

    @property
    def of_steps(self) -> list[str]:
        """The functions that say that they give rewards to single steps."""
        return [pool.called for pool in self.pools if pool.wait_ready().gives_steps]

    @property
    def sees_whole_step(self) -> bool:
        """Whether a function is called once with all samples of a step: they must be submitted together."""
        return any(pool.spec.batch == "step" for pool in self.pools)

    @property
    def win_rate(self) -> str | None:
        """The objective that is a judge's win rate and the whole reward; None: functions give the rewards."""
        return None

    @contextmanager
    def without_judge(self) -> Generator[None]:
        """What is submitted or checked meanwhile is for the functions alone."""
        yield

    def print_to(self, path: Path) -> None:
        """Appends what reward functions print to this file, each line preceded by the function's name."""
        for pool in self.pools:
            pool.log = partial(print_to, path, pool.name)

    def close(self) -> None:
        """Ends all workers. A later `submit` starts new ones."""
        _close(self.pools)

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Sample]],
        texts: Sequence[Sequence[str]],
        *,
        trainer_state: Mapping[str, Any],
    ) -> tuple[list[Group], Metrics]:
        """Submits the completions and waits: the scored groups and metrics."""
        return self.submit(prompts, completions, texts, trainer_state=trainer_state).result()

    def submit(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Sample]],
        texts: Sequence[Sequence[str]],
        *,
        trainer_state: Mapping[str, Any],
        step_samples: int | None = None,
    ) -> Scoring:
        """Starts scoring the completions of each prompt; `texts` are these decoded.

        `step_samples`: the number of samples of the whole step, if the step is submitted in parts; the number
        of samples that may fail is a share of it. The parts are then passed to `gather` together.

        Raises RewardError when a function cannot be run any more.
        """
        batch = Batch.of(prompts, completions, texts)
        return self.submit_batch(batch, trainer_state=trainer_state, step_samples=step_samples)

    def submit_batch(
        self, batch: Batch, *, trainer_state: Mapping[str, Any], step_samples: int | None = None
    ) -> Scoring:
        """As `submit`."""
        scoring = Scoring(self, batch, len(batch.texts) if step_samples is None else step_samples)
        state = dict(trainer_state)
        if self.max_steps is not None:
            state |= {"max_steps": self.max_steps, "epoch": state["global_step"] / self.steps_per_epoch}
        for number, pool in enumerate(self.pools):
            pool.submit(self._calls(scoring, number, state))
        return scoring

    def gather(self, scorings: Sequence[Scoring]) -> tuple[list[Group], Metrics]:
        """Waits for all of them. Returns their groups, in order, and metrics over all groups.

        The reward of a trajectory is the sum of weight times value over its objectives.

        Raises RewardError, which names the function, when a function returns the wrong length or type, when
        it cannot be run any more, and when more than `max_failed_share` of the samples have no reward. The
        last is raised as soon as it is certain; the remaining samples are then not scored.
        """
        try:
            for scoring in scorings:
                self.wait(scoring)
            groups = [group for scoring in scorings for group in self._groups(scoring)]
            self._refuse_too_many_failures(groups, scorings)
        finally:
            with self._changed:
                self._failed = [0] * len(self.pools)
                self._given_up = None
        samples = [sample for scoring in scorings for sample in scoring.batch.completions]
        scored = self.pools or any(t.objectives for group in groups for t in group.trajectories)
        metrics = (reward_metrics(groups) if scored else {}) | turn_metrics(samples)
        for number, pool in enumerate(self.pools):
            parts = [scoring.by_function[number] for scoring in scorings]
            metrics |= function_metrics(pool.name, parts, has_cache=self.caches[number] is not None)
            if pool.replaced:
                metrics[f"reward/replaced/{pool.name}"] = Sum(float(pool.replaced))
                pool.replaced = 0
        return groups, metrics

    def _calls(self, scoring: Scoring, number: int, trainer_state: Mapping[str, Any]) -> list[Call]:
        pool, batch, wanted = self.pools[number], scoring.batch, scoring.by_function[number].to_score
        size = pool.spec.batch
        if size == "group":
            cuts = [tuple(i for i in group if batch.lost(i) is None) for _, group in batch.groups]
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
        """Called by the thread of a worker with the outcome of one call."""
        name, failure = self.pools[number].name, outcome.failure
        for column, logged in outcome.extra.items():
            for sample, text in zip(samples, logged, strict=True):
                self.pools[number].log(f"{scoring.batch.name(sample)} {column}: {text}")
        with self._changed:
            answered, failed = scoring.by_function[number].add(samples, outcome)
            scoring.unanswered -= answered
            self._failed[number] += len(failed)
            if failure is not None and failure.kind == "wrong":
                self._given_up = f"{self.pools[number].called} {failure.message}"
            elif self._failed[number] > self._max_failed_share * scoring.step_samples:
                self._given_up = ""
            # a wrong return stops the run with an error that says so: it is not logged as well
            first = failure is not None and (name, failure.kind) not in {*self._logged, (name, "wrong")}
            if failure is not None:
                self._logged.add((name, failure.kind))
            if scoring.done or self._given_up is not None:
                self._changed.notify_all()
        if first and failed:
            self.pools[number].log_failure(scoring.batch.name(failed[0][0]), failed[0][1])

    def wait(self, scoring: Scoring) -> None:
        """As `Scoring.wait`."""
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

    def _trajectory(self, scoring: Scoring, number: int) -> Trajectory:
        sample = scoring.batch.completions[number]
        scored = [scores.scores[number] for scores in scoring.by_function]
        given: list[tuple[str, Scores]] = [(p.name, s or {}) for p, s in zip(self.pools, scored, strict=True)]
        if isinstance(sample, Episode):
            given.append((f"{ENVIRONMENT}{sample.environment}", dict(sample.rewards)))
        objectives, steps, total = dict[str, float](), list[Scored](), 0.0
        for owner, values in given:
            for objective, value in values.items():
                self._claim(objective, owner)
                weight, objectives[objective] = self._weight(owner, objective), summed(value)
                total += weight * objectives[objective]
                steps += [Scored(owner, weight, value)] if isinstance(value, list) else []
        complete = bool(objectives) and all(scores is not None for scores in scored)
        if not self.pools and not (isinstance(sample, Episode) and self.environment_rewards):
            # the algorithm learns without rewards, from every completion
            complete = True
        lost = scoring.batch.lost(number) is not None
        text, reward = scoring.batch.texts[number], total if complete and not lost else None
        trajectory = trajectory_of(sample, text=text, reward=reward, objectives=objectives)
        if steps and reward is not None and trajectory.token_ids:
            assert self.decode is not None
            earned = step_rewards(steps, sample, text, self.decode)
            trajectory = replace(trajectory, step_rewards=earned)
        logged = {
            f"{pool.name}/{column}": text
            for pool, scores in zip(self.pools, scoring.by_function, strict=True)
            for column, text in scores.extra[number].items()
        }
        return replace(trajectory, logged=logged) if logged else trajectory

    def _claim(self, objective: str, owner: str) -> None:
        """Raises RewardError when an objective may not be called so, or two owners name one alike."""
        if objective in TAKEN:
            raise RewardError(f"reward function {owner}: {taken(objective)}")
        first = self._owner.setdefault(objective, owner)
        if first != owner:
            raise RewardError(
                f"reward functions {first} and {owner} both name an objective {objective!r}; give one "
                "another name"
            )

    def _refuse_too_many_failures(self, groups: Sequence[Group], scorings: Sequence[Scoring]) -> None:
        rewards = [trajectory.reward for group in groups for trajectory in group.trajectories]
        unanswered = sum(scoring.unanswered for scoring in scorings) // max(1, len(self.pools))
        total, without = len(rewards), rewards.count(None) - unanswered
        if unanswered:
            total = max([total, *(scoring.step_samples for scoring in scorings)])
        if without <= self._max_failed_share * total:
            return
        blame = [
            self._blame(pool, [(s.batch, s.by_function[number]) for s in scorings])
            for number, pool in enumerate(self.pools)
        ]
        blame += [lost_episodes(s.batch) for s in scorings]
        spec = self.pools[0].spec if self.pools else RewardSpec
        raise RewardError(
            f"{without} of {total} {spec.scored}s have no {spec.score}, more than "
            f"max_failed_share = {self._max_failed_share}: "
            f"{'; '.join(filter(None, blame)) or spec.none_given}"
        )

    def _blame(self, pool: WorkerPool, parts: Sequence[tuple[Batch, BatchScores]]) -> str:
        """What an error says about one function: its failures and the first cause; empty if it has none."""
        failures = [(batch, *failure) for batch, scores in parts for failure in scores.failures]
        if not failures:
            return ""
        batch, sample, failure = failures[0]
        where = f"for {batch.name(sample)}, completion {batch.texts[sample]!r:.80}"
        return f"{pool.name} failed on {len(failures)} ({failure.message} {where})"


def _close(pools: Sequence[WorkerPool]) -> None:
    for pool in pools:
        pool.close()
