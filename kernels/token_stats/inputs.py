"""What both entry points do to their inputs: check them, and drop the tokens that are masked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.kernels.token_stats.state import FIELDS, IGNORED, NEEDS_REFERENCE

UNKNOWN = -1
"""As `num_unmasked`: the tokens that are not masked are counted within the operator."""


def wanted_fields(want: Sequence[str], *, has_reference: bool) -> frozenset[str]:
    """The names as a set. Raises ValueError for an unknown one, or one that lacks a reference model."""
    wanted = frozenset((want,) if isinstance(want, str) else want)
    if not wanted or wanted - set(FIELDS):
        raise ValueError(f"want={tuple(want)!r}: expected one or more of {', '.join(FIELDS)}")
    if NEEDS_REFERENCE & wanted and not has_reference:
        raise ValueError(f"want={tuple(want)!r} compares with a reference model: pass its side (ref_...)")
    return wanted


def check_scaling(temperature: float | Tensor, softcap: float | None, tokens: int) -> None:
    """Raise ValueError for a temperature or a cap that is no such thing."""
    if isinstance(temperature, Tensor):
        if temperature.shape != (tokens,):
            raise ValueError(f"expected a number or [{tokens}] as temperature, got {list(temperature.shape)}")
    elif not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}; None is no cap")


def unmasked_index(targets: Tensor, num_unmasked: int) -> Tensor | None:
    """The positions of tokens that are not masked, in order; None where every token is kept.

    A known number spares the host from waiting for a GPU. Raises ValueError on a CPU when it is wrong.
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
    """Raise ValueError for a target outside the vocabulary; only where looking costs no wait.

    On a GPU, and where the vocabulary is spread over ranks, such a token gets a log-probability of NaN.
    """
    if group or targets.device.type != "cpu" or not len(targets):
        return
    low, high = torch.aminmax(targets)
    if low < 0 or high >= vocabulary:
        wrong = int(low) if low < 0 else int(high)
        raise ValueError(f"target {wrong} is outside [0, {vocabulary}); mask a token with {IGNORED}")


def spread(values: Tensor, index: Tensor | None, count: int) -> Tensor:
    """The values of kept tokens at their own places among all N, 0 elsewhere."""
    if index is None:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy(0, index, values)


def gathered(values: Tensor, index: Tensor | None) -> Tensor:
    """The kept tokens' part of a tensor `[N, ...]`."""
    return values if index is None else values.index_select(0, index)
