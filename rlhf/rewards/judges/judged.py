"""`JudgedRewards`: reward functions, or none, and a judge that compares the completions of each prompt.

The judge's answers become `Group.duels`. Where there are no reward functions, the reward of a completion is
its mean win rate: the mean of P(it is better) over its duels with the others of its prompt (the r_t of DNO,
arXiv:2404.03715). A comparison that fails, is late or gets no verdict leaves its duel out; it never counts as
a tie. Completions with the same tokens are a tie, and the judge is not asked. A completion without a known
duel has no reward, and neither has an episode whose environment failed, which is in no duel.

"Reward functions" are below also environments that give rewards.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rlhf.metrics import Metrics
from rlhf.rewards.judges.duels import Asking, DuelBatch, Verdicts, duel_metrics
from rlhf.rewards.judges.plugin import JudgeSpec
from rlhf.rewards.measures import function_metrics, reward_metrics
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.scoring import Rewards, Scoring
from rlhf.rewards.workers.batch import Batch
from rlhf.rewards.workers.pool import WorkerPool
from rlhf.types import Group


class JudgedRewards(Rewards):
    """As `Rewards`, and a judge, whose comparisons run in worker processes of their own at the same time."""

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        columns: Iterable[str],
        judge: JudgeSpec,
        asking: Asking,
        *,
        max_failed_share: float = 0.1,
    ) -> None:
        """`max_failed_share`: of samples without a reward, and of comparisons without a verdict."""
        columns = tuple(columns)
        # before all else, because `check_columns`, which is overridden, is called by what follows
        self.judge = Rewards([judge], columns, max_failed_share=max_failed_share)
        self.asking = asking
        self._asks = True
        try:
            super().__init__(specs, columns, max_failed_share=max_failed_share)
            if self.name in {pool.name for pool in self.pools}:
                raise ValueError(
                    f"the judge and a reward function are both named {self.name}: name one of them"
                )
        except ValueError:
            self.judge.close()
            raise

    @property
    def name(self) -> str:
        """The judge's name, and that of the win rate among the objectives."""
        return self.judge.pools[0].name

    @property
    def has_rewards(self) -> bool:
        """Whether reward functions or environments give the rewards, so that the judge only labels pairs."""
        return bool(self.pools) or self.environment_rewards

    @property
    def win_rate(self) -> str | None:
        return None if self.has_rewards else self.name

    def check_columns(self, columns: Iterable[str]) -> None:
        columns = tuple(columns)
        super().check_columns(columns)
        if self._asks:
            self.judge.check_columns(columns)

    def cautions(self, columns: Iterable[str]) -> Iterator[str]:
        columns = tuple(columns)
        yield from super().cautions(columns)
        yield from self.judge.cautions(columns)

    @property
    def weights(self) -> dict[str, float]:
        return super().weights if self.has_rewards else {self.name: 1.0}

    @property
    def all_pools(self) -> list[WorkerPool]:
        return [*self.pools, *self.judge.pools]

    @property
    def sees_whole_step(self) -> bool:
        return super().sees_whole_step or self.judge.sees_whole_step

    def print_to(self, path: Path) -> None:
        super().print_to(path)
        self.judge.print_to(path)

    def close(self) -> None:
        super().close()
        self.judge.close()

    @contextmanager
    def without_judge(self) -> Generator[None]:
        self._asks = False
        try:
            yield
        finally:
            self._asks = True

    def submit_batch(
        self, batch: Batch, *, trainer_state: Mapping[str, Any], step_samples: int | None = None
    ) -> Scoring:
        scoring = super().submit_batch(batch, trainer_state=trainer_state, step_samples=step_samples)
        if self._asks:
            judge, duels = self.judge, DuelBatch.asked(batch, self.asking)
            judge.max_steps, judge.steps_per_epoch = self.max_steps, self.steps_per_epoch
            scoring.judging = judge.submit_batch(
                duels, trainer_state=trainer_state, step_samples=self._step_calls(batch, step_samples)
            )
        return scoring

    def gather(self, scorings: Sequence[Scoring]) -> tuple[list[Group], Metrics]:
        """As for reward functions. The duels are part of the groups, and the win rates if they are the
        rewards.

        Raises RewardError too, and names the judge, when it cannot be run, returns what is no verdict, or
        gives none for more than `max_failed_share` of the comparisons.
        """
        groups, metrics = super().gather(scorings)
        judging = [scoring.judging for scoring in scorings if scoring.judging is not None]
        if not judging:
            return groups, metrics
        answered, _ = self.judge.gather(judging)
        verdicts = [v for part in judging for v in _verdicts(part, answered)]
        groups = [self._judged(group, v) for group, v in zip(groups, verdicts, strict=True)]
        parts = [part.by_function[0] for part in judging]
        metrics |= function_metrics(self.name, parts, has_cache=self.judge.caches[0] is not None)
        return groups, metrics | duel_metrics(verdicts) | reward_metrics(groups)

    def _judged(self, group: Group, verdicts: Verdicts) -> Group:
        trajectories = group.trajectories
        if not self.has_rewards:
            rates = verdicts.win_rates(len(trajectories))
            trajectories = tuple(
                replace(t, reward=rate, objectives={} if rate is None else {self.name: rate})
                for t, rate in zip(trajectories, rates, strict=True)
            )
        return replace(group, trajectories=trajectories, duels=verdicts.duels)

    def _step_calls(self, batch: Batch, step_samples: int | None) -> int | None:
        """Comparisons of the whole step, if its groups are like those of `batch`; None: `batch` is all."""
        if step_samples is None or not batch.texts:
            return None
        calls = sum(self.asking.calls(len(samples)) for _, samples in batch.groups)
        return calls * step_samples // len(batch.texts)


def _verdicts(judging: Scoring, answered: list[Group]) -> Iterator[Verdicts]:
    """Of each group of one submission; takes its part away from the front of `answered`."""
    batch = cast(DuelBatch, judging.batch)
    parts = zip(batch.scored.groups, batch.groups, batch.ties, strict=True)
    for (_, samples), (_, calls), ties in parts:
        group = answered.pop(0)
        places = [(a - samples.start, b - samples.start) for a, b in (batch.places[call] for call in calls)]
        yield Verdicts.of(places, [t.reward for t in group.trajectories], ties)
