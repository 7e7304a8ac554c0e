"""Passes without gradient over packed groups: log-probs of tokens, and their sums over sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf.distributed.world import World
from rlhf.models.packing import Microbatch, microbatches
from rlhf.models.policy import Policy
from rlhf.models.sharding import in_step
from rlhf.types import PackedGroups

Seen = Callable[[Microbatch, Tensor], None]
"""Gets a microbatch and the hidden states `[n, H]` that predict its n tokens, before its log-probs are made.
The head's weight is then whole, also that of a sharded model."""


@torch.no_grad()
def token_logprobs(
    policy: Policy,
    packed: PackedGroups,
    world: World,
    *,
    temperature: float,
    budget: int,
    seen: Seen | None = None,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """Log-probs of the tokens of `packed` in fp32 `[N]`, at `temperature`.

    A forward pass has at most `budget` tokens. Every rank calls it, also one without groups: all ranks take
    part in the passes of a sharded model. `groups`: only these get log-probs, the others zeros; None: all.
    """
    result = torch.zeros_like(packed.rollout_logprobs)
    groups = range(len(packed.prompts)) if groups is None else groups
    micros = microbatches(packed, groups, budget, layout=policy.layout)
    for micro in in_step(micros, policy.model, world):
        if micro is None:
            policy.dummy_pass()
            continue
        hidden = policy.hidden(micro.packed)
        if seen is not None:
            seen(micro, hidden)
        statistics = policy.statistics(
            micro.packed, temperature=temperature, want=("logprob",), hidden=hidden
        )
        assert statistics.logprob is not None
        result[micro.index] = statistics.logprob.to(result.dtype)
    return result


def sequence_logprobs(
    policy: Policy,
    packed: PackedGroups,
    world: World,
    *,
    temperature: float,
    budget: int,
    seen: Seen | None = None,
) -> Tensor:
    """Log-prob of each sequence given its prompt, `[S]` in float64 on the CPU: the sum over its tokens in the
    loss mask. The arguments are those of `token_logprobs`.
    """
    logprobs = token_logprobs(policy, packed, world, temperature=temperature, budget=budget, seen=seen)
    return sums_by_sequence(logprobs, packed)


def sums_by_sequence(values: Tensor, packed: PackedGroups) -> Tensor:
    """Sums of `values` `[N]` over the tokens of each sequence that are in the loss mask: `[S]`, float64, on
    the CPU, where the order of additions is fixed.
    """
    masked = values.masked_fill(~packed.loss_mask, 0.0).double().cpu()
    return torch.zeros(len(packed.group), dtype=torch.float64).index_add_(0, packed.sequence.cpu(), masked)
