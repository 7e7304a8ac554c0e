"""Advantages: how much better a completion or a token was than expected (GRPO, RLOO, GDPO, REINFORCE++).

None of them has a gradient. `group` holds, for each sequence, the number of its prompt, `0 .. P-1`; groups
may differ in size. Without `group`, `rewards` is `[P, G]`, one row for each group. A reward that is NaN is
missing: it enters no statistic and its advantage is 0.

Differences from the papers and codes: 1. standard deviations are unbiased (divided by n - 1) everywhere, as
in the codes; the papers say "std" and no more; 2. a group whose rewards are all equal has advantage exactly
0, decided by max == min (the fp32 mean of equal numbers may be off by 6e-8, which eps does not hide); 3. so
has a group of one, where verl uses the raw reward: without others nothing is known about it; 4. a prompt's
own group size counts, no correction is made for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.algos.segments import sequence_sum
from rlhf.kernels.gae import gae as gae
from rlhf.types import AdvantageInputs

Advantage = Callable[[AdvantageInputs], Tensor]
"""Function that returns the advantage of each token `[N]`, 0 where the loss mask is False."""


def group_center(
    rewards: Float[Tensor, " ..."], group: Int[Tensor, " S"] | None = None
) -> Float[Tensor, " ..."]:
    """Reward minus the mean of its group (Dr. GRPO, arXiv:2503.20783)."""
    flat, ids = _flatten(rewards, group)
    centered, _, _ = _centered(flat, ids)
    return centered.view_as(rewards)


def group_normalize(
    rewards: Float[Tensor, " ..."], group: Int[Tensor, " S"] | None = None, *, eps: float = 1e-6
) -> Float[Tensor, " ..."]:
    """(reward - mean of its group) / (standard deviation of its group + eps) (GRPO, arXiv:2402.03300)."""
    flat, ids = _flatten(rewards, group)
    centered, count, total = _centered(flat, ids)
    std = (total(centered.square()) / (count - 1).clamp(min=1)).sqrt()
    return (centered / (std + eps)).view_as(rewards)


def leave_one_out(
    rewards: Float[Tensor, " ..."], group: Int[Tensor, " S"] | None = None
) -> Float[Tensor, " ..."]:
    """Reward minus the mean of the *other* rewards of its group (RLOO, arXiv:2402.14740 eq. 8)."""
    flat, ids = _flatten(rewards, group)
    centered, count, _ = _centered(flat, ids)
    return (centered * count / (count - 1).clamp(min=1)).view_as(rewards)


def gdpo(
    objectives: Float[Tensor, "S K"],
    group: Int[Tensor, " S"],
    weights: Float[Tensor, " K"],
    *,
    eps: float = 1e-4,
    all_sum: Callable[[Tensor], Tensor] = lambda t: t,
) -> Float[Tensor, " S"]:
    """Each objective normalised in its group, weighted, added, normalised over the batch (arXiv:2601.05242).

    As in TRL, the batch is all sequences of all ranks (through `all_sum`), and eps is 1e-4 in both places.
    """
    # K is 0 in a step in which every reward failed
    columns = [group_normalize(column, group, eps=eps) for column in objectives.unbind(1)]
    normalized = torch.stack(columns, dim=1) if columns else objectives
    summed = normalized @ weights.to(objectives.dtype)
    centered, std = _moments(summed, ~objectives.isnan().all(dim=1), all_sum)
    # the batch's mean is 0 up to rounding, which must not give an advantage to a group without a signal
    return (centered / (std + eps)).masked_fill(summed == 0, 0.0).to(objectives.dtype)


def reinforce_pp(
    rewards: Float[Tensor, " S"],
    token_penalty: Float[Tensor, " N"],
    sequence: Int[Tensor, " N"],
    loss_mask: Bool[Tensor, " N"],
    *,
    all_sum: Callable[[Tensor], Tensor] = lambda t: t,
) -> Float[Tensor, " N"]:
    """The reward minus the penalties from this token on, whitened over all tokens (arXiv:2501.03262).

    Tokens outside the mask get 0, and their penalties do not count.
    """
    raw = to_go(rewards, token_penalty, sequence, loss_mask)
    return whiten(raw, loss_mask & ~raw.isnan(), all_sum=all_sum).to(rewards.dtype)


def to_go(
    rewards: Float[Tensor, " S"],
    token_penalty: Float[Tensor, " N"],
    sequence: Int[Tensor, " N"],
    loss_mask: Bool[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """The reward of each token's sequence minus the penalties from the token on, in float64.

    Penalties outside the mask do not count. NaN where the reward is missing.
    """
    penalty = token_penalty.double().masked_fill(~loss_mask, 0.0)
    total = penalty.new_zeros(len(rewards)).index_add(0, sequence, penalty)
    # penalties from the batch's start to the end of the token's sequence, minus those before the token
    still_to_come = total.cumsum(0)[sequence] - (penalty.cumsum(0) - penalty)
    return rewards.double()[sequence] - still_to_come


def reinforce_pp_baseline(
    rewards: Float[Tensor, " S"],
    group: Int[Tensor, " S"],
    sequence: Int[Tensor, " N"],
    loss_mask: Bool[Tensor, " N"],
    *,
    all_sum: Callable[[Tensor], Tensor] = lambda t: t,
) -> Float[Tensor, " N"]:
    """Reward minus the mean of its group, whitened over all tokens (arXiv:2501.03262, with a baseline)."""
    known = ~rewards.isnan()[sequence]
    centered = group_center(rewards, group)[sequence]
    return whiten(centered, loss_mask & known, all_sum=all_sum).to(rewards.dtype)


def whiten(
    x: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    *,
    all_sum: Callable[[Tensor], Tensor] = lambda t: t,
    eps: float = 1e-8,
) -> Float[Tensor, " N"]:
    """(x - mean) / sqrt(unbiased variance + eps) over the unmasked tokens of all ranks; 0 elsewhere.

    Computed and returned in float64, in which the mean of equal fp32 numbers is exactly that number.
    """
    centered, std = _moments(x.double(), mask, all_sum)
    return centered * (std.square() + eps).rsqrt()


def per_sequence(normalize: Callable[[Tensor, Tensor], Tensor]) -> Advantage:
    """The advantage `normalize(rewards[S], group[S])` of a sequence, given to all its tokens.

    The reward of a sequence is R_i minus the penalties of its tokens (`without_penalty`).
    """

    def advantage(inputs: AdvantageInputs) -> Tensor:
        return to_tokens(normalize(without_penalty(inputs), inputs.group), inputs)

    return advantage


def nothing(inputs: AdvantageInputs) -> Tensor:
    """0 everywhere: the algorithm has no loss of tokens (`Algorithm.loss` leaves that part out)."""
    return torch.zeros_like(inputs.token_penalty)


def by_step(inputs: AdvantageInputs) -> Tensor:
    """The sum of the normalised rewards of the steps that end at this token or later (GRPO with process
    supervision, arXiv:2402.03300 section 4.1.3).

    Rewards of steps are normalised over all steps of all completions of a group. Unlike in the paper, where
    they are everything, what else a completion has earned is normalised over the group by itself, less the
    penalties of a KL in the reward, and added.
    """
    x, (at, rest) = inputs, steps_of(inputs)
    steps = group_normalize(at, x.group[x.sequence])
    outcome = group_normalize(without_penalty(replace(x, rewards=rest)), x.group)
    raw = to_go(outcome, -steps, x.sequence, x.loss_mask)
    return raw.masked_fill(~x.loss_mask, 0.0).to(x.rewards.dtype)


def steps_of(inputs: AdvantageInputs) -> tuple[Float[Tensor, " N"], Float[Tensor, " S"]]:
    """The reward of the step that ends at each token, NaN where none ends, and what the last token earned."""
    if inputs.steps is None:
        return torch.full_like(inputs.token_penalty, torch.nan), inputs.rewards
    return inputs.steps.at, inputs.steps.rest


def own_only(advantage: Advantage) -> Advantage:
    """The advantage among what the policy itself sampled; 0 for completions of other models or of data."""

    def of_own(inputs: AdvantageInputs) -> Tensor:
        if inputs.own is None:
            return advantage(inputs)
        known = replace(inputs, rewards=inputs.rewards.masked_fill(~inputs.own, torch.nan))
        return advantage(known)

    return of_own


def preference_to_go(inputs: AdvantageInputs) -> Tensor:
    """P - 1/2 minus the penalties from this token on, where the reward is P(the completion wins) (Nash-MD-PG,
    arXiv:2312.00886 eq. 3). TRL's NashMDTrainer takes off each token's own penalty alone, which is biased.
    """
    x = inputs
    raw = to_go(x.rewards - 0.5, x.token_penalty, x.sequence, x.loss_mask)
    return raw.masked_fill(~x.loss_mask | raw.isnan(), 0.0).to(x.rewards.dtype)


def gdpo_advantage(inputs: AdvantageInputs) -> Tensor:
    """`gdpo` as an `Advantage`: the value of each sequence, given to all its tokens."""
    x = inputs
    return to_tokens(gdpo(x.objectives, x.group, x.objective_weights, all_sum=x.all_sum), x)


def by_turn(tool_objectives: Sequence[str], coef: float, *, eps: float = 1e-6) -> Advantage:
    """Normalised outcome + `coef` * normalised tool reward in the first turn, later ones without it (DTPO).

    The tool reward is the weighted sum of `tool_objectives`, the outcome that of all other objectives less
    the penalties of a KL in the reward; each is normalised over its group (`group_normalize`,
    arXiv:2512.03794). A completion that answers at once has one turn, the first, so that it gets both parts,
    as in the paper's code. A completion without any objective of a part has none of its advantage, and is in
    none of its statistics: the paper's tool reward is 0, not missing, where no tool was called.
    """
    if not tool_objectives:
        raise ValueError("tool_objectives is empty: name the objectives that judge how a tool was called")

    def advantage(inputs: AdvantageInputs) -> Tensor:
        x = inputs
        of_tool = [k for k, name in enumerate(x.names) if name in tool_objectives]
        others = [k for k in range(x.objectives.shape[1]) if k not in of_tool]
        outcome = without_penalty(replace(x, rewards=_weighted(x, others)))
        outcomes = to_tokens(group_normalize(outcome, x.group, eps=eps), x)
        tools = to_tokens(group_normalize(_weighted(x, of_tool), x.group, eps=eps), x)
        return outcomes + coef * tools.masked_fill(x.turn > 0, 0.0)

    return advantage


def _weighted(inputs: AdvantageInputs, chosen: Sequence[int]) -> Tensor:
    """`[S]`: the weighted sum of the objectives with these numbers; NaN where a sequence has none of them."""
    objectives = inputs.objectives[:, chosen]
    weights = inputs.objective_weights[chosen].to(objectives.dtype)
    total = objectives.nan_to_num(nan=0.0) @ weights
    return total.masked_fill(objectives.isnan().all(dim=1), torch.nan)


def reinforce_pp_advantage(inputs: AdvantageInputs) -> Tensor:
    """`reinforce_pp` as an `Advantage`: rewards of steps count for the tokens up to the end of the step."""
    x, (at, rest) = inputs, steps_of(inputs)
    penalty = x.token_penalty - at.nan_to_num(nan=0.0)
    return reinforce_pp(rest, penalty, x.sequence, x.loss_mask, all_sum=x.all_sum)


def reinforce_pp_baseline_advantage(inputs: AdvantageInputs) -> Tensor:
    """`reinforce_pp_baseline` as an `Advantage`."""
    x = inputs
    return reinforce_pp_baseline(without_penalty(x), x.group, x.sequence, x.loss_mask, all_sum=x.all_sum)


def without_penalty(inputs: AdvantageInputs) -> Tensor:
    """Rewards `[S]` minus the penalties of their tokens, which come from a KL in the reward."""
    penalty = inputs.token_penalty.masked_fill(~inputs.loss_mask, 0.0)
    return inputs.rewards.index_add(0, inputs.sequence, penalty.to(inputs.rewards.dtype), alpha=-1)


def to_tokens(x: Tensor, inputs: AdvantageInputs) -> Tensor:
    """A value of each sequence `[S]`, given to all its tokens in the loss mask `[N]`; 0 elsewhere."""
    return x[inputs.sequence].masked_fill(~inputs.loss_mask, 0.0)


def _flatten(rewards: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rewards as `[S]`, and the number of the group of each."""
    if group is not None:
        if rewards.shape != group.shape or rewards.ndim != 1:
            raise ValueError(
                f"rewards and group must both be [S], got {[*rewards.shape]} and {[*group.shape]}"
            )
        return rewards, group
    if rewards.ndim != 2:
        raise ValueError(
            f"without group, rewards must be [P, G], one row for each group; got shape {[*rewards.shape]}"
        )
    rows = torch.arange(rewards.shape[0], device=rewards.device)
    return rewards.reshape(-1), rows.repeat_interleave(rewards.shape[1])


def _centered(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """For each sequence: its reward minus the group's mean, the group's size, and a sum over the group.

    Missing rewards are not counted, and are 0 in the first result.
    """
    known = ~rewards.isnan()
    filled = rewards.masked_fill(~known, 0.0)

    def total(x: Tensor) -> Tensor:
        return sequence_sum(x, group)

    count = total(known.to(rewards.dtype)).clamp(min=1)
    high = torch.full_like(filled, -torch.inf).scatter_reduce(
        0, group, filled.masked_fill(~known, -torch.inf), "amax"
    )
    low = torch.full_like(filled, torch.inf).scatter_reduce(
        0, group, filled.masked_fill(~known, torch.inf), "amin"
    )
    silent = ~known | (high == low)[group]
    return (filled - total(filled) / count).masked_fill(silent, 0.0), count, total


def _moments(x: Tensor, mask: Tensor, all_sum: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """x minus its mean, 0 outside the mask, and the unbiased standard deviation, over all ranks."""
    filled = x.masked_fill(~mask, 0.0)
    count, total = all_sum(torch.stack([mask.sum().to(x.dtype), filled.sum()])).unbind()
    centered = (filled - total / count.clamp(min=1)).masked_fill(~mask, 0.0)
    return centered, (all_sum(centered.square().sum()) / (count - 1).clamp(min=1)).sqrt()
