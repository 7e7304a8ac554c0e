"""A loss on comparisons is a value: form x score x compare, with a baseline and a pull.

    (weight * sum over contrasts of weight_m * compare(margin_m, target_m)
     + sum over sequences of pull_i * log policy_i) / comparisons of the whole update

    margin_m = sum over the entries e of m: coefficient_e * score(e) - offset_m

Differences from papers and codes: 1. the mean is over the comparisons of the whole update, and what ties is
none (oat divides by the batch, TRL gives a tie to the first); 2. log-probs are summed in fp32 or better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf.algos.preference.chase import Chase, chase_loss, lead
from rlhf.algos.preference.compares import Compare
from rlhf.algos.preference.forms import Form, Row, pairs
from rlhf.algos.preference.pairing import Comparison
from rlhf.algos.preference.scores import Score, Sums
from rlhf.metrics import Mean, Metrics
from rlhf.tensors.contrasts import Contrasts
from rlhf.tensors.transfer import numbers
from rlhf.types import LossInputs, Source


@dataclass(frozen=True, slots=True)
class ComparedGroup:
    """What a loss sees of a group before it packs it: its comparisons, and each completion's tokens and
    source."""

    comparisons: Sequence[Comparison]
    tokens: Sequence[int]
    sources: Sequence[Source]


Pull = Callable[[ComparedGroup], list[float]]
"""A group -> the constant that multiplies the log-prob of each of its completions in the loss."""


def toward_better(coef: float, *, per_token: bool) -> Pull:
    """-coef, or -coef / tokens: adds coef times the negative log-likelihood of the better completion."""

    def pull(group: ComparedGroup) -> list[float]:
        pulls = [0.0] * len(group.tokens)
        for comparison in group.comparisons:
            tokens = max(group.tokens[comparison.better], 1) if per_token else 1
            pulls[comparison.better] -= coef / tokens
        return pulls

    return pull


def away_from(source: Source, coef: float) -> Pull:
    """+coef on what `source` sampled: adds coef times its mean log-likelihood for each comparison."""

    def pull(group: ComparedGroup) -> list[float]:
        pulled = [s == source for s in group.sources]
        share = coef * len(group.comparisons) / max(sum(pulled), 1)
        return [share * is_pulled for is_pulled in pulled]

    return pull


def below_data(coef: float) -> Pull:
    """+coef on samples, -coef on the data that is compared, each a mean, for each comparison (SPAC)."""

    def pull(group: ComparedGroup) -> list[float]:
        own = [s != Source.DATA for s in group.sources]
        pulls = [coef * len(group.comparisons) / max(sum(own), 1) * is_own for is_own in own]
        for comparison in group.comparisons:
            for i in (comparison.better, comparison.other):
                if i is not None and any(own):
                    pulls[i] -= 0.5 * coef
        return pulls

    return pull


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """The preference part of an algorithm.

    Example, DPO: `Preference(score=log_ratio(0.1), compare=logistic(), uses=frozenset({"reference"}))`.
    """

    score: Score
    compare: Compare
    form: Form = pairs
    uses: frozenset[str] = frozenset()
    """The frozen models that the score reads: `reference`, `iterate` (the policy of the last iteration)."""
    weight: float = 1.0
    """Factor of the compare part."""
    baseline: Literal["none", "other_prompts", "running_mean"] = "none"
    """What is subtracted from margins, one constant a step on all ranks: `other_prompts`, max(0, mean D of
    completions under another prompt of the step) (KTO); `running_mean`, the mean D of all completions so far
    (BCO)."""
    baseline_scale: float = 1.0
    """The baseline, in nats, times this is the offset of a margin."""
    pull: Pull | None = None
    """What multiplies the log-prob of each completion. None: 0."""
    bound: float | None = None
    """Where `compare` clips margins, for metrics. None: it does not."""
    chase: Chase | None = None
    """Given where two copies of the policy learn. None: there is one."""

    def rows(self, group: ComparedGroup) -> list[Row]:
        """The rows of all comparisons of a group. Raises ValueError: the form takes no single completion."""
        return [row for comparison in group.comparisons for row in self.form(comparison, group.sources)]

    def pulls(self, group: ComparedGroup) -> list[float]:
        """The pull of each completion of a group."""
        return [0.0] * len(group.tokens) if self.pull is None else self.pull(group)

    def learned(self, group: ComparedGroup) -> set[int]:
        """The completions of a group that the loss depends on; of the pair alone where second answers will
        be made of it."""
        if self.form.revises:
            return {i for c in group.comparisons for i in (c.better, c.other) if i is not None}
        used = {i for row in self.rows(group) for i, _ in row.entries}
        return used | {i for i, pull in enumerate(self.pulls(group)) if pull}


class Compared(NamedTuple):
    """The parts of a loss; tensors of contrasts are `[M]`."""

    sums: Sums
    margin: Tensor
    losses: Tensor
    """Of contrasts, with every factor."""
    pulled: Tensor
    """The sum over sequences of pull * log policy, a scalar."""
    chased: Tensor | None = None
    """Of contrasts, with every factor but alpha; None where one copy of the policy learns."""


def contrast_loss(batch: LossInputs, preference: Preference) -> tuple[Tensor, Metrics]:
    """This microbatch's share of the preference loss of the whole update, and its metrics."""
    contrasts = batch.contrasts
    assert contrasts is not None, "the algorithm compares completions"
    compared = _compare(batch, contrasts, preference)
    loss = compared.losses.sum() + compared.pulled
    metrics = _metrics(contrasts, preference, compared)
    if preference.chase is not None and compared.chased is not None:
        loss = loss + preference.chase.alpha * compared.chased.sum()
        metrics |= _chase_metrics(batch, compared)
    return loss / (batch.counts.comparisons or 1.0), metrics


def margins(batch: LossInputs, preference: Preference) -> Tensor:
    """The margin of each contrast of a microbatch, `[M]`."""
    assert batch.contrasts is not None, "the algorithm compares completions"
    return _compare(batch, batch.contrasts, preference).margin


def _compare(batch: LossInputs, contrasts: Contrasts, preference: Preference) -> Compared:
    policy = _completion_sums(batch.logprobs, batch)  # [N], of which the first S are sequences

    def frozen(name: str, logprobs: Tensor | None) -> Tensor | None:
        if name not in preference.uses:
            return None
        assert logprobs is not None, f"the algorithm needs the log-probs of the {name}"
        return _completion_sums(logprobs, batch)[contrasts.sequence]

    tokens = _completion_sums(torch.ones_like(policy), batch).clamp(min=1)
    sums = Sums(
        policy[contrasts.sequence],
        frozen("reference", batch.ref_logprobs),
        tokens[contrasts.sequence],
        frozen("iterate", batch.iterate_logprobs),
    )
    contrasts = _in(policy.dtype, contrasts)
    scores = contrasts.coefficient * preference.score(sums, contrasts.coefficient)
    margin = torch.index_add(-contrasts.offset, 0, contrasts.contrast, scores)
    losses = preference.weight * contrasts.weight * preference.compare(margin, contrasts.target)
    pulled = policy.new_zeros(())
    if batch.pull is not None:
        pulled = (batch.pull.to(policy.dtype) * policy[: len(batch.pull)]).sum()
    chased = None
    if batch.rival is not None:
        chased = preference.weight * contrasts.weight * chase_loss(margin, batch.rival, contrasts.target)
    return Compared(sums, margin, losses, pulled, chased)


def _completion_sums(x: Tensor, batch: LossInputs) -> Tensor:
    """Sums of `x` over the unmasked tokens of each sequence, in fp32 or better: `[N]`, zeros from S on."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~batch.loss_mask, 0.0)
    return torch.zeros_like(x).index_add(0, batch.sequence, x)


def _in(dtype: torch.dtype, contrasts: Contrasts) -> Contrasts:
    return Contrasts(
        contrasts.sequence,
        contrasts.coefficient.to(dtype),
        contrasts.contrast,
        contrasts.target.to(dtype),
        contrasts.weight.to(dtype),
        contrasts.share.to(dtype),
        contrasts.offset.to(dtype),
    )


def _metrics(contrasts: Contrasts, preference: Preference, compared: Compared) -> Metrics:
    """Means over comparisons (a contrast counts with its share); nothing where there are none."""
    sums, margin = compared.sums, compared.margin.detach()
    contrasts = _in(margin.dtype, contrasts)
    share, slope = contrasts.share, _slope(margin, contrasts, preference)
    # +1 where what has + should win, -1 where it should lose, 0 where the label does not say
    side = (contrasts.target - 0.5).sign()
    totals = {
        "loss": compared.losses.detach().sum(),
        "accuracy": (share * (1.0 + side * margin.sign()) / 2.0).sum(),
        "margin": (share * side * margin).sum(),
        "weight": (share * slope.abs()).sum(),
    }
    if preference.bound is not None:
        over = margin.abs() >= preference.bound
        totals["clipped"] = (share * over).sum()
        totals["clipped_wrong"] = (share * (over & (side * margin < 0))).sum()
    of_entry = contrasts.contrast
    upper = contrasts.coefficient * torch.where(side < 0, -1.0, 1.0).to(margin.dtype)[of_entry] > 0
    sides = {"chosen": upper, "rejected": ~upper}
    read, *by_side, rest = numbers(
        totals,
        *(_side_totals(sums, share[of_entry].masked_fill(~where, 0.0)) for where in sides.values()),
        {"comparisons": share.sum(), "pulled": compared.pulled.detach()},
    )
    return _as_metrics(read, dict(zip(sides, by_side, strict=True)), rest, preference)


def _chase_metrics(batch: LossInputs, compared: Compared) -> Metrics:
    """How far the fast copy is ahead of the slow one, as a mean over comparisons."""
    assert batch.contrasts is not None and batch.rival is not None
    margin = compared.margin.detach()
    contrasts = _in(margin.dtype, batch.contrasts)
    ahead = (contrasts.target - 0.5).sign() * lead(margin, batch.rival)
    [read] = numbers({"ahead": (contrasts.share * ahead).sum(), "comparisons": contrasts.share.sum()})
    return {"twin/gap": Mean(read["ahead"], read["comparisons"])} if read["comparisons"] else {}


def _side_totals(sums: Sums, share: Tensor) -> dict[str, Tensor]:
    """Totals over the entries of one side, of which each counts with its `share` `[E]`."""
    totals = {
        "share": share.sum(),
        "logprob": (share * sums.policy.detach()).sum(),
        "tokens": (share * sums.tokens).sum(),
    }
    if sums.reference is not None or sums.iterate is not None:
        ratio = sums.log_ratio_to_iterate if sums.reference is None else sums.log_ratio
        totals["logratio"] = (share * ratio.detach()).sum()
    return totals


def _as_metrics(
    read: dict[str, float],
    sides: dict[str, dict[str, float]],
    rest: dict[str, float],
    preference: Preference,
) -> Metrics:
    comparisons = rest["comparisons"]
    if not comparisons:
        return {}
    metrics: Metrics = {f"pairs/{name}": Mean(total, comparisons) for name, total in read.items()}
    if preference.pull is not None:
        metrics["pairs/pull"] = Mean(rest["pulled"], comparisons)
    for side, totals in sides.items():
        if not totals["share"]:
            continue
        metrics[f"pairs/{side}_logprob"] = Mean(totals["logprob"], totals["tokens"])
        metrics[f"pairs/{side}_tokens"] = Mean(totals["tokens"], totals["share"])
        if "logratio" in totals:
            metrics[f"pairs/{side}_logratio"] = Mean(totals["logratio"], totals["share"])
    return metrics


def _slope(margin: Tensor, contrasts: Contrasts, preference: Preference) -> Tensor:
    """d loss / d margin of each contrast, `[M]`."""
    with torch.enable_grad():
        leaf = margin.detach().requires_grad_()
        loss = preference.weight * (contrasts.weight * preference.compare(leaf, contrasts.target)).sum()
        return torch.autograd.grad(loss, leaf)[0]
