"""Evaluates the policy on held-out preference pairs: how many it orders as labelled, and by how much.

With D = log policy - log reference of a whole completion, the implied reward of a completion is beta D, and a
pair counts as right when the chosen completion's is larger. Ranking accuracy compares log-probs instead:
arXiv:2405.19534 (definition 2.3), which also gives what the optimum of DPO would reach (`idealised`,
appendix A.5). Two quirks of its code are left out: there a ratio within 5 % of 1 is a tie, and the
variant without division by the length compares quotients of log-probs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.checkpoints.stateful import CheckpointError, Stateful, TensorFiles
from rlhf.distributed.world import World
from rlhf.evaluation.intervals import share_interval
from rlhf.evaluation.likelihood import Likelihood, TopK
from rlhf.learn.experience import pack_groups
from rlhf.learn.logprobs import Seen, sequence_logprobs, sums_by_sequence
from rlhf.learn.models import Models
from rlhf.models.packing import Microbatch
from rlhf.models.policy import Policy
from rlhf.torch_typed import numbers
from rlhf.types import Group, PackedGroups

SHOWN = 8
"""Most pairs that are written into a record."""
USUAL_AGREEMENT = 0.75
"""Share of annotators who prefer the chosen completion, where the data does not say it (arXiv:2405.19534)."""
CHOSEN = 0
"""Place of the better completion in a pair."""
CERTAIN = 1e-3
"""Such a share is taken to lie at least this far from 1."""


class LogProbs(NamedTuple):
    """Log-probs of the two completions of a pair, each the sum over its tokens, in nats."""

    chosen: float
    rejected: float

    @property
    def margin(self) -> float:
        return self.chosen - self.rejected


@dataclass(frozen=True, slots=True)
class Pair:
    """A held-out pair."""

    group: Group
    """Two trajectories, the better one first."""
    probability: float | None
    """P(the first one is better), 0.5 or more. None: the label gives the order alone."""

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of each completion that the policy would have chosen."""
        chosen, rejected = (sum(t.loss_mask) for t in self.group.trajectories)
        return chosen, rejected

    @property
    def has_order(self) -> bool:
        return self.probability != 0.5

    def right(self, margin: float) -> float:
        """1 where `margin`, chosen minus rejected, has the sign of the label, 0 where not; a tie is half."""
        return 0.5 if margin == 0 or not self.has_order else float(margin > 0)


def as_pair(group: Group) -> Pair:
    """The pair of a group of two: the order is that of its duel, where it has one, else of the rewards.

    Raises ValueError: there are not two completions, one has no tokens, or nothing orders them.
    """
    name, trajectories = group.prompt.id, group.trajectories
    if len(trajectories) != 2:
        raise ValueError(
            f"{name}: a held-out pair has two completions, got {len(trajectories)}; give chosen and rejected"
        )
    if not all(any(t.loss_mask) for t in trajectories):
        raise ValueError(
            f"{name}: a completion of this held-out pair has no tokens; give it some, or leave it"
        )
    if group.duels:
        p = fmean(d.probability if d.first == 0 else 1.0 - d.probability for d in group.duels)
    else:
        first, second = (t.reward for t in trajectories)
        if first is None or second is None:
            raise ValueError(f"{name}: a completion of this held-out pair has no reward to order the two by")
        p = 0.5 if first == second else float(first > second)
    ordered = group if p >= 0.5 else replace(group, trajectories=trajectories[::-1], duels=())
    known = group.duels or p == 0.5
    return Pair(ordered, max(p, 1.0 - p) if known else None)


def held_out_pairs(groups: Sequence[Group]) -> list[Group]:
    """The groups as pairs: of more than two completions the one with the highest and the one with the lowest
    reward. Groups of one completion and those whose rewards are equal are left out.

    Raises ValueError: no pair is left.
    """
    pairs: list[Group] = []
    for group in groups:
        scored = [(t.reward, t) for t in group.trajectories if t.reward is not None]
        if len(group.trajectories) == 2 and (group.duels or len({r for r, _ in scored}) == 2):
            pairs.append(group)
        elif len({r for r, _ in scored}) > 1:
            best, worst = (pick(scored, key=lambda pair: pair[0])[1] for pick in (max, min))
            pairs.append(replace(group, trajectories=(best, worst), duels=()))
    if not pairs:
        raise ValueError(
            f"{groups[0].prompt.id}: no held-out line has two completions with unequal rewards, so there are "
            "no pairs to evaluate on; give pairs in data.eval, or prompts alone and reward.functions"
        )
    return pairs


@dataclass(frozen=True, slots=True)
class PairResult:
    """What an evaluation says of the held-out pairs; a tie counts half in every accuracy."""

    num_pairs: int
    accuracy: float
    """Share of pairs whose implied rewards have the order of the labels: D of chosen above D of rejected."""
    ci_low: float
    """Lower end of its 95% interval over pairs."""
    ci_high: float
    accuracy_logprob: float
    """Share whose chosen completion has the larger log-prob."""
    accuracy_per_token: float
    """Share whose chosen completion has the larger log-prob a token."""
    accuracy_reference: float
    """As `accuracy_logprob`, of the reference."""
    flipped: float | None
    """Share of the pairs that the reference orders wrongly by log-prob whose order is right now; None: it
    orders none wrongly."""
    idealised: float | None
    """Share that the optimum of the DPO objective would order rightly by log-prob, with the run's beta and
    the label's probability (0.75 where the data gives none). None: the method has no beta."""
    margin: float
    """Mean of D of chosen minus D of rejected, in nats."""
    chosen_logratio: float
    """Mean of D of chosen, in nats."""
    topk_mass: float
    """Of the chosen completions: mass of the 10 most probable tokens, mean over tokens, then completions."""
    topk_entropy: float
    """Their entropy in nats, averaged so."""
    topk_entropy_normalised: float
    """Their entropy after division by their mass, in nats, averaged so."""
    samples: list[dict[str, Any]]
    """A few pairs, the same each time: prompt, chosen, rejected, margin in nats, and whether it is right."""


def idealised_margin(ref_log_ratio: float, agreement: float, beta: float) -> float:
    """log policy(w) / policy(l) at the optimum of DPO: log ref(w) / ref(l) + log(a / (1 - a)) / beta.

    `agreement` a: share of annotators who prefer w (arXiv:2405.19534, appendix A.5).
    """
    a = min(max(agreement, CERTAIN), 1.0 - CERTAIN)
    return ref_log_ratio + math.log(a / (1.0 - a)) / beta


def summary(
    pairs: Sequence[Pair],
    policy: Sequence[LogProbs],
    reference: Sequence[LogProbs],
    likelihood: Sequence[Likelihood],
    beta: float | None,
) -> PairResult:
    """The result, from what policy and reference say of each pair."""
    drifts = [
        LogProbs(p.chosen - r.chosen, p.rejected - r.rejected) for p, r in zip(policy, reference, strict=True)
    ]
    right = [pair.right(drift.margin) for pair, drift in zip(pairs, drifts, strict=True)]
    low, high = share_interval(right)
    now = [pair.right(p.margin) for pair, p in zip(pairs, policy, strict=True)]
    before = [pair.right(r.margin) for pair, r in zip(pairs, reference, strict=True)]
    wrong_before = [after for first, after in zip(before, now, strict=True) if first == 0]
    per_token = [
        pair.right(p.chosen / pair.lengths[0] - p.rejected / pair.lengths[1])
        for pair, p in zip(pairs, policy, strict=True)
    ]
    mass, entropy, normalised = (fmean(figures) for figures in zip(*likelihood, strict=True))
    return PairResult(
        num_pairs=len(pairs),
        accuracy=fmean(right),
        ci_low=low,
        ci_high=high,
        accuracy_logprob=fmean(now),
        accuracy_per_token=fmean(per_token),
        accuracy_reference=fmean(before),
        flipped=fmean(wrong_before) if wrong_before else None,
        idealised=None if beta is None else _idealised(pairs, reference, beta),
        margin=fmean(drift.margin for drift in drifts),
        chosen_logratio=fmean(drift.chosen for drift in drifts),
        topk_mass=mass,
        topk_entropy=entropy,
        topk_entropy_normalised=normalised,
        samples=[_sample(*shown) for shown in zip(pairs[:SHOWN], drifts, right, strict=False)],
    )


def _idealised(pairs: Sequence[Pair], reference: Sequence[LogProbs], beta: float) -> float:
    agreed = [USUAL_AGREEMENT if pair.probability is None else pair.probability for pair in pairs]
    return fmean(
        pair.right(idealised_margin(r.margin, a, beta))
        for pair, r, a in zip(pairs, reference, agreed, strict=True)
    )


def _sample(pair: Pair, drift: LogProbs, right: float) -> dict[str, Any]:
    content = pair.group.prompt.content
    chosen, rejected = pair.group.trajectories
    return {
        "prompt": content if isinstance(content, str) else str(content[-1]["content"]),
        "chosen": chosen.text,
        "rejected": rejected.text,
        "margin": drift.margin,
        "right": right == 1.0,
    }


class PairEvaluation(Stateful):
    """Evaluates the policy on held-out pairs; each rank computes a share of them, all return the same.

    It keeps the reference's log-probs of the pairs, and a checkpoint holds them. For a method without a
    reference they are those of the policy before step 1.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        models: Models,
        world: World,
        *,
        temperature: float,
        microbatch_tokens: int,
        beta: float | None = None,
    ) -> None:
        """`temperature`: that at which the learner computes log-probs. `beta`: that of the method, in nats.

        Raises ValueError as `as_pair` does.
        """
        self.pairs = [as_pair(group) for group in groups]
        self.models, self.world, self.beta = models, world, beta
        self.temperature, self.microbatch_tokens = temperature, microbatch_tokens
        self._mine = [pair.group for pair in self.pairs[world.rank :: world.size]]
        self._reference: list[LogProbs] | None = None

    def prepare(self) -> str:
        """Computes what the reference says of the pairs, unless a checkpoint had it; returns a line about it.

        Every rank calls it, before the first step.
        """
        if self._reference is None:
            rows = self._logprobs(self.models.reference or self.models.policy, self._pack())
            self._reference = [LogProbs(*row) for row in self._of_all_ranks(rows)]
        right = fmean(p.right(r.margin) for p, r in zip(self.pairs, self._reference, strict=True))
        whose = "policy before step 1" if self.models.reference is None else "reference"
        return (
            f"the {whose} gives the chosen completion the larger log-probability in {right:.3f} of "
            f"{len(self.pairs)} held-out pairs"
        )

    def evaluate(
        self, between: Callable[[], None] | None = None, detail: Callable[[str], None] | None = None
    ) -> PairResult:
        """Every rank calls it, after `prepare`. `between` is called between forward passes, `detail` with how
        far it is, in words.
        """
        assert self._reference is not None, "prepare() comes before the first step"
        policy, packed = self.models.policy, self._pack()
        topk = TopK(policy.head, packed.loss_mask & (packed.sequence % 2 == CHOSEN), self.temperature)
        done = 0

        def seen(micro: Microbatch, hidden: Tensor) -> None:
            nonlocal done
            topk(micro, hidden)
            done += len(micro.index)
            if between is not None:
                between()
            if detail is not None:
                detail(f"{done} of {len(packed.token_ids)} tokens of pairs")

        logprobs = self._logprobs(policy, packed, seen)
        counts = sums_by_sequence(torch.ones_like(packed.rollout_logprobs), packed)
        means = [sums_by_sequence(figure, packed) / counts for figure in topk.found.unbind(-1)]
        columns = [*logprobs.unbind(-1), *(mean.view(-1, 2)[:, CHOSEN] for mean in means)]
        rows = self._of_all_ranks(torch.stack(columns, -1))
        return summary(
            self.pairs,
            [LogProbs(*row[:2]) for row in rows],
            self._reference,
            [Likelihood(*row[2:]) for row in rows],
            self.beta,
        )

    def state(self) -> dict[str, Any]:
        known = self._reference
        return {"pairs": self._digest(), "reference": None if known is None else [list(r) for r in known]}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        """Raises CheckpointError: the pairs are others, and the method has no reference to ask about them."""
        saved = state["reference"]
        if state["pairs"] == self._digest():
            self._reference = None if saved is None else [LogProbs(*pair) for pair in saved]
        elif self.models.reference is None and saved is not None:
            raise CheckpointError(
                "the held-out pairs (or rollout.temperature) are not those of the checkpoint. They are "
                "compared with the policy before step 1, which no longer exists; go on with the data.eval of "
                "the run, or begin a new run in another run_dir"
            )

    def _pack(self) -> PackedGroups:
        """This rank's pairs; sequences alternate: chosen, rejected."""
        return pack_groups(self._mine, device=self.world.device)

    def _logprobs(self, policy: Policy, packed: PackedGroups, seen: Seen | None = None) -> Tensor:
        """Log-probs of chosen and rejected of this rank's pairs `[P, 2]`."""
        sums = sequence_logprobs(
            policy,
            packed,
            self.world,
            temperature=self.temperature,
            budget=self.microbatch_tokens,
            seen=seen,
        )
        return sums.view(-1, 2)

    def _of_all_ranks(self, rows: Tensor) -> list[list[float]]:
        """The rows of all pairs, from those of this rank's pairs."""
        parts = self.world.gather([numbers(row) for row in rows])
        return [parts[i % len(parts)][i // len(parts)] for i in range(len(self.pairs))]

    def _digest(self) -> str:
        """Of the tokens and labels of the pairs, and of the temperature."""
        hashed = hashlib.blake2b(repr(self.temperature).encode(), digest_size=16)
        for pair in self.pairs:
            completions = [(t.token_ids, t.loss_mask) for t in pair.group.trajectories]
            hashed.update(repr((pair.group.prompt.token_ids, completions, pair.probability)).encode())
        return hashed.hexdigest()
