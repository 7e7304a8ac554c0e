"""Checks of the inputs of `token_stats` and `logit_stats`, and how they drop and restore masked tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.kernels.token_stats.state import FIELDS, IGNORED, NEEDS_REFERENCE

UNKNOWN = -1
"""Value of `num_unmasked` that lets the operator count the unmasked tokens itself."""


def wanted_fields(want: Sequence[str], *, has_reference: bool) -> frozenset[str]:
    """The names as a set. Raises ValueError for unknown names and for a missing reference model."""
    wanted = frozenset((want,) if isinstance(want, str) else want)
    if not wanted or wanted - set(FIELDS):
        raise ValueError(f"want={tuple(want)!r}: expected one or more of {', '.join(FIELDS)}")
    if NEEDS_REFERENCE & wanted and not has_reference:
        raise ValueError(f"want={tuple(want)!r} needs a reference model: pass its inputs (ref_...)")
    return wanted


def check_scaling(temperature: float | Tensor, softcap: float | None, tokens: int) -> None:
    """Raises ValueError for a temperature or softcap of wrong shape or not above 0."""
    if isinstance(temperature, Tensor):
        if temperature.shape != (tokens,):
            raise ValueError(f"expected a number or [{tokens}] as temperature, got {list(temperature.shape)}")
    elif not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}; None switches it off")


def unmasked_index(targets: Tensor, num_unmasked: int) -> Tensor | None:
    """The positions of the unmasked tokens, in order; None if no token is masked.

    With a known `num_unmasked` the host need not wait for a GPU. Raises ValueError on a CPU if it is wrong.
    """
    if num_unmasked == len(targets):
        return None
    is_unmasked = targets != IGNORED
    if num_unmasked != UNKNOWN and targets.device.type != "cpu":
        return torch.argsort(is_unmasked, descending=True, stable=True)[:num_unmasked]
    index = is_unmasked.nonzero()[:, 0]
    if num_unmasked not in (UNKNOWN, len(index)):
        raise ValueError(f"num_unmasked is {num_unmasked}, but {len(index)} targets are not {IGNORED}")
    return None if len(index) == len(targets) else index


def check_targets(targets: Tensor, vocabulary: int, group: str) -> None:
    """Raises ValueError for a target outside the vocabulary, on a CPU and without a process group.

    Elsewhere the check would need a wait; there such a token gets a log-probability of NaN.
    """
    if group or targets.device.type != "cpu" or not len(targets):
        return
    low, high = torch.aminmax(targets)
    if low < 0 or high >= vocabulary:
        wrong = int(low) if low < 0 else int(high)
        raise ValueError(f"target {wrong} is outside [0, {vocabulary}); mask a token with {IGNORED}")


def spread(values: Tensor, index: Tensor | None, count: int) -> Tensor:
    """The values of the unmasked tokens at their own positions among all N tokens, 0 elsewhere."""
    if index is None:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy(0, index, values)


def gathered(values: Tensor, index: Tensor | None) -> Tensor:
    """The entries of the unmasked tokens from a tensor `[N, ...]`."""
    return values if index is None else values.index_select(0, index)
