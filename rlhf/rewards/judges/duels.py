"""The duels of a group: which completions a judge compares, in which order, and what its answers say.

duels 0-1 0-2 1-2, in both orders: six calls.   P(0, 1) = .7778 and P(1, 0) = .4  ->  P(0 beats 1) = .6889
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import fsum
from typing import Any

from rlhf.config.run import Config
from rlhf.metrics import Mean, Metrics, Sum
from rlhf.rewards.workers.batch import Batch
from rlhf.rollout.episode import Sample
from rlhf.types import Completion, Duel, FinishReason, Prompt


@dataclass(frozen=True, slots=True)
class Asking:
    """Which comparisons of a group are asked."""

    first_two: bool
    """Of the first two completions alone, as the pairing rule `first_two` needs; else of every two."""
    both_orders: bool

    def duels(self, size: int) -> Iterator[tuple[int, int]]:
        """The two places in the group of each duel, the lower one first."""
        return combinations(range(min(size, 2) if self.first_two else size), 2)

    def calls(self, size: int) -> int:
        """Calls for a group of `size` completions that all differ."""
        return len(list(self.duels(size))) * (2 if self.both_orders else 1)


def asking(config: Config) -> Asking:
    """What a run needs: the pairing rule `first_two` one duel, all other rules and algorithms all."""
    judge, prefers = config.reward.preference, config.build_algorithm().preference is not None
    assert judge is not None
    return Asking(prefers and config.pairs.rule == "first_two", judge.both_orders)


@dataclass(frozen=True, slots=True)
class DuelBatch(Batch):
    """The comparisons of a batch of completions, each a sample of the judge; of a duel its orders in turn."""

    scored: Batch
    """The completions that are compared."""
    places: list[tuple[int, int]]
    """Of each comparison: which two of `scored` stand in the first and in the second place."""
    ties: list[list[tuple[int, int]]]
    """By group: the duels of completions with the same tokens, which are not asked; places in the group."""

    @classmethod
    def asked(cls, scored: Batch, asking: Asking) -> DuelBatch:
        """Those of `asking`, but without duels of the same tokens, which are ties, and without lost episodes,
        of which nothing is known."""
        groups: list[tuple[Prompt, range]] = []
        places: list[tuple[int, int]] = []
        ties: list[list[tuple[int, int]]] = []
        for prompt, samples in scored.groups:
            start, same = len(places), list[tuple[int, int]]()
            for i, j in asking.duels(len(samples)):
                a, b = samples[i], samples[j]
                if scored.lost(a) is not None or scored.lost(b) is not None:
                    continue
                if scored.completions[a].token_ids == scored.completions[b].token_ids:
                    same.append((i, j))
                else:
                    places += [(a, b), (b, a)] if asking.both_orders else [(a, b)]
            groups.append((prompt, range(start, len(places))))
            ties.append(same)
        prompts = [prompt for prompt, calls in groups for _ in calls]
        # stand-ins without tokens: what is compared is taken from `scored`
        blank: list[Sample] = [
            Completion(p.id, i, (), None, FinishReason.STOP, ()) for i, p in enumerate(prompts)
        ]
        return cls(groups, prompts, blank, [scored.texts[a] for a, _ in places], scored, places, ties)

    def arguments(
        self, samples: Sequence[int], wanted: Iterable[str] | None, trainer_state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """As for reward functions, with two entries in `completions`, `completion_ids` and `environments` for
        each prompt."""
        pairs = [self.places[i] for i in samples]
        given = Batch.arguments(self, samples, wanted, trainer_state)
        if "completion_ids" in given:
            given["completion_ids"] = [
                [list(self.scored.completions[k].token_ids) for k in pair] for pair in pairs
            ]
        if self.scored.has_episodes and (wanted is None or "environments" in wanted):
            given["environments"] = [[self.scored.environment(k) for k in pair] for pair in pairs]
        return given | {"completions": [[self.scored.completion(k) for k in pair] for pair in pairs]}

    def name(self, sample: int) -> str:
        first, second = (self.scored.completions[k].index for k in self.places[sample])
        return f"{self.prompts[sample].id}#{first} against #{second}"


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What the judge said of the duels of one group."""

    asked: int
    """Number of duels."""
    duels: tuple[Duel, ...]
    """Those that have a verdict, in both orders where both were asked, and those of the same tokens."""
    first: tuple[float, ...]
    """Of each comparison with a verdict: 1 if the first place won, 0 if the second, 0.5 for a tie."""
    disagree: tuple[bool, ...]
    """Of each duel that is known in both orders: whether these name different winners."""
    failed: int = 0
    """Duels that were asked and have no verdict."""

    @classmethod
    def of(
        cls,
        places: Sequence[tuple[int, int]],
        answers: Sequence[float | None],
        ties: Sequence[tuple[int, int]] = (),
    ) -> Verdicts:
        """`places`: of each comparison, places in the group; `answers`: P(the first is better), if known.
        `ties`: duels that need no judge, because P(a, a) = 1/2.

        With both orders p = (P(a, b) + 1 - P(b, a)) / 2; a duel of which one order is not known is not known,
        because one order alone has the judge's bias for a place.
        """
        by_duel: dict[tuple[int, int], list[float | None]] = {}
        for (a, b), answer in zip(places, answers, strict=True):
            by_duel.setdefault((min(a, b), max(a, b)), []).append(answer)
        duels: list[Duel] = []
        disagree: list[bool] = []
        for (a, b), both in by_duel.items():
            known = [answer for answer in both if answer is not None]
            if len(known) < len(both):
                continue
            # as differences from 1/2, so that equal answers to both orders are exactly a tie
            signed = [known[0] - 0.5, *(0.5 - answer for answer in known[1:])]
            duels.append(Duel(a, b, 0.5 + fsum(signed) / len(signed)))
            disagree += [min(signed) < 0.0 < max(signed)] * (len(both) > 1)
        won = tuple(0.5 if a == 0.5 else float(a > 0.5) for a in answers if a is not None)
        failed = len(by_duel) - len(duels)
        duels += [Duel(a, b, 0.5) for a, b in ties]
        return cls(len(by_duel), tuple(duels), won, tuple(disagree), failed)

    def win_rates(self, size: int) -> list[float | None]:
        """Mean P of each of `size` completions over its known duels; None: it has none."""
        wins: list[list[float]] = [[] for _ in range(size)]
        for duel in self.duels:
            wins[duel.first].append(duel.probability)
            wins[duel.second].append(1.0 - duel.probability)
        return [fsum(known) / len(known) if known else None for known in wins]


def duel_metrics(verdicts: Sequence[Verdicts]) -> Metrics:
    """How many duels were asked, and how the judge judges; no share of what there was none of."""
    asked, failed = sum(v.asked for v in verdicts), sum(v.failed for v in verdicts)
    first = [won for v in verdicts for won in v.first]
    disagree = [differs for v in verdicts for differs in v.disagree]
    shares = {
        "duels/failed": Mean(float(failed), float(asked)),
        "duels/disagree": Mean(float(sum(disagree)), float(len(disagree))),
        "duels/first": Mean(fsum(first), float(len(first))),
    }
    return {
        "duels/asked": Sum(float(asked)),
        **{name: share for name, share in shares.items() if share.count},
    }
