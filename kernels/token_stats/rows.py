"""Row kernels in plain PyTorch: fold a tile of logits into the rows' state, or turn it into its gradient.

A tile is `[R, C]`: R tokens, C neighbouring columns of the vocabulary, small enough to stay in a CPU's
cache during the elementwise passes below. `triton_rows` has the same two kernels for GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rlhf.kernels.token_stats.state import (
    FLOOR,
    GAP,
    MAX,
    OTHERS,
    OWNED,
    REF_GAP,
    REF_MAX,
    REF_OTHERS,
    REF_TARGET,
    S_ENTROPY,
    S_KL,
    S_LOG_SUM,
    S_LOGPROB,
    S_MAX,
    S_REF_LOG_SUM,
    S_REF_MAX,
    SHIFTED,
    TARGET,
)


@dataclass(frozen=True)
class Scaling:
    """How raw logits z are scaled: softcap * tanh(logit_scale * z / softcap) / temperature."""

    temperature: float | Tensor
    logit_scale: float = 1.0
    softcap: float | None = None

    def rows(self, start: int, stop: int) -> Scaling:
        """The scaling of rows `start` to `stop`."""
        if isinstance(self.temperature, Tensor):
            return Scaling(self.temperature[start:stop], self.logit_scale, self.softcap)
        return self

    def divisor(self) -> float | Tensor:
        """The temperature, as a number or `[R, 1]`."""
        return self.temperature[:, None] if isinstance(self.temperature, Tensor) else self.temperature


@dataclass(frozen=True)
class Tile:
    """Raw logits `[R, C]` of the policy and optionally of the reference model, and what scales them.

    `first` is the token id of the first column. The biases `[C]` are not yet added. Logits may have any
    floating type and any row stride. With `may_be_infinite`, or with a bias, a logit may be minus infinity:
    its token has probability 0.
    """

    logits: Tensor
    first: int
    targets: Tensor
    scaling: Scaling
    bias: Tensor | None = None
    ref_logits: Tensor | None = None
    ref_bias: Tensor | None = None
    may_be_infinite: bool = False


@dataclass(frozen=True)
class Upstream:
    """Gradients `[rows]` of the loss by each statistic; None where there is none, which saves its work."""

    logprob: Tensor | None
    entropy: Tensor | None
    logsumexp: Tensor | None
    kl: Tensor | None
    kl_reverse: Tensor | None

    @property
    def needs_reference(self) -> bool:
        """Whether the gradient depends on the reference model's logits."""
        return self.kl is not None or self.kl_reverse is not None


class Scratch:
    """Named buffers of one tile each, allocated at first use and reused for every later tile."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._size, self.dtype, self._device = size, dtype, device
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int) -> Tensor:
        """The buffer `name` as a `[rows, columns]` matrix with aligned rows, its content undefined."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self._size, dtype=self.dtype, device=self._device)
        width = padded(columns)
        return self._buffers[name][: rows * width].view(rows, width)[:, :columns]


def padded(columns: int) -> int:
    """The row length of a buffer: `columns` rounded up to a multiple of 16, so that rows start aligned."""
    return (columns + 15) // 16 * 16


def fold(state: Tensor, tile: Tile, *, entropy: bool, scratch: Scratch) -> None:
    """Folds a tile into the running state `[STATE_ROWS, R]` of its rows, in place."""
    a = _scaled(tile, scratch, "policy")
    column, inside = _target_column(tile)
    state[OWNED] += inside
    at_target = a.gather(1, column)
    state[TARGET] += torch.where(inside, at_target[:, 0], 0.0)

    top = torch.maximum(state[MAX], a.amax(1))
    down = state[MAX] - top
    share = down.exp()
    d = torch.sub(a, top[:, None], out=scratch("d", *a.shape))
    weight = _exp_of_others(d, column, inside, scratch("weight", *a.shape))

    gap = None
    if tile.ref_logits is not None:
        u = _scaled(tile, scratch, "reference")
        gap = _fold_reference(state, u, d, weight, (column, inside), down, scratch)
    if entropy:
        state[SHIFTED] = share * (state[SHIFTED] + down * state[OTHERS]) + _dot(weight, d, out=d)
    if gap is not None:
        state[GAP] = share * (state[GAP] + (down - gap.ref_down) * state[OTHERS]) + gap.policy_sum
    state[OTHERS] = share * state[OTHERS] + weight.sum(1)
    state[MAX] = top


@dataclass(frozen=True)
class _Gap:
    ref_down: Tensor
    policy_sum: Tensor


def _fold_reference(
    state: Tensor,
    u: Tensor,
    d: Tensor,
    weight: Tensor,
    target: tuple[Tensor, Tensor],
    down: Tensor,
    scratch: Scratch,
) -> _Gap:
    column, inside = target
    state[REF_TARGET] += torch.where(inside, u.gather(1, column)[:, 0], 0.0)
    top = torch.maximum(state[REF_MAX], u.amax(1))
    ref_down = state[REF_MAX] - top
    share = ref_down.exp()
    e = torch.sub(u, top[:, None], out=scratch("e", *u.shape))
    ref_weight = _exp_of_others(e, column, inside, scratch("ref_weight", *u.shape))
    gap = torch.sub(d, e, out=e)
    ref_gap = state[REF_GAP] + (ref_down - down) * state[REF_OTHERS]
    state[REF_OTHERS] = share * state[REF_OTHERS] + ref_weight.sum(1)
    state[REF_GAP] = share * ref_gap - _dot(ref_weight, gap, out=ref_weight)
    state[REF_MAX] = top
    return _Gap(ref_down, _dot(weight, gap, out=gap))


def gradient(tile: Tile, coefficients: Coefficients, *, scratch: Scratch) -> Tensor:
    """The loss's gradient by the tile's raw logits (before the bias), `[R, C]`, in a scratch buffer.

    With d = a - max, and e the same for the reference model, the gradient by the scaled logits is
        exp(d) (CONSTANT + SLOPE d - GAP_SLOPE e) - PULL exp(e)
    plus exp(d) BOOST + OWN at the target's column.
    """
    values = coefficients.values[:, :, None]
    a = _scaled(tile, scratch, "policy")
    column, inside = _target_column(tile)
    d = torch.sub(a, values[TOP], out=scratch("d", *a.shape))
    result = torch.exp(d, out=scratch("weight", *a.shape))
    boost = (result.gather(1, column) * values[BOOST] + values[OWN])[:, 0]

    e = None
    if tile.ref_logits is not None:
        u = _scaled(tile, scratch, "reference")
        e = torch.sub(u, values[REF_TOP], out=scratch("e", *u.shape))
    if coefficients.has_slope:
        factor = d.mul_(values[SLOPE]).add_(values[CONSTANT])
        if e is not None and coefficients.has_gap:
            factor.addcmul_(e, values[GAP_SLOPE], value=-1.0)
        result.mul_(factor)
    else:
        result.mul_(values[CONSTANT])
    if e is not None and coefficients.has_pull:
        result.sub_(e.exp_().mul_(values[PULL]))
    result.scatter_add_(1, column, torch.where(inside, boost, 0.0)[:, None])
    return _through_scaling(result, tile, scratch)


TOP, REF_TOP, CONSTANT, SLOPE, GAP_SLOPE, PULL, BOOST, OWN = range(8)


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of `gradient`'s formula: `values` `[8, rows]`, and which of them can differ from 0."""

    values: Tensor
    has_slope: bool
    has_gap: bool
    has_pull: bool

    def rows(self, start: int, stop: int) -> Coefficients:
        """The coefficients of rows `start` to `stop`."""
        return Coefficients(self.values[:, start:stop], self.has_slope, self.has_gap, self.has_pull)


def magnified(coefficients: Coefficients, upstream: Upstream) -> tuple[Coefficients, Tensor]:
    """The coefficients times a power of 2, so that fp16 can hold the gradient, and that power.

    The gradient of a loss that is divided by its number of tokens is below fp16's smallest number in almost
    every column; the factor brings the largest upstream gradient to between 8 and 16.
    """
    given = (upstream.logprob, upstream.entropy, upstream.logsumexp, upstream.kl, upstream.kl_reverse)
    largest = torch.stack([g.abs().amax() for g in given if g is not None and len(g)]).amax()
    factor = torch.where(largest > 0, (16 / largest).log2().floor().exp2(), 1.0)
    scaled = coefficients.values.clone()
    scaled[CONSTANT:] *= factor
    return replace(coefficients, values=scaled), factor


def coefficients(saved: Tensor, upstream: Upstream) -> Coefficients:
    """Coefficients of the gradient, from saved rows `[SAVED_ROWS, rows]` and the loss's upstream gradients.

    With probabilities p = exp(d - log_sum) and q, and upstream gradients g, the gradient is
        p (-g_logprob - g_entropy (log p + entropy) + g_kl (log p - log q - kl) + g_kl_reverse + g_lse)
        - g_kl_reverse q,
    plus g_logprob at the target. There both terms of g_logprob are written as -g_logprob expm1(logprob),
    which stays exact for a token whose probability is nearly 1.
    """
    zero = torch.zeros_like(saved[S_MAX])
    log_sum, ref_log_sum = saved[S_LOG_SUM], saved[S_REF_LOG_SUM]
    g_logprob, constant, slope = zero, zero, zero
    if upstream.logprob is not None:
        # a target outside the vocabulary has no log-probability and passes no gradient
        g_logprob = torch.where(saved[S_LOGPROB].isnan(), 0.0, upstream.logprob)
        constant = -g_logprob
    if upstream.logsumexp is not None:
        constant = constant + upstream.logsumexp
    if upstream.entropy is not None:
        constant = constant + upstream.entropy * (log_sum - saved[S_ENTROPY])
        slope = slope - upstream.entropy
    if upstream.kl is not None:
        constant = constant - upstream.kl * (log_sum - ref_log_sum + saved[S_KL])
        slope = slope + upstream.kl
    if upstream.kl_reverse is not None:
        constant = constant + upstream.kl_reverse
    share = (-log_sum).exp()
    pull = zero if upstream.kl_reverse is None else upstream.kl_reverse * (-ref_log_sum).exp()
    own = (
        zero
        if upstream.logprob is None
        else -g_logprob * torch.where(g_logprob == 0, 0.0, saved[S_LOGPROB]).expm1()
    )
    gap_slope = zero if upstream.kl is None else upstream.kl * share
    values = (
        saved[S_MAX],
        saved[S_REF_MAX],
        constant * share,
        slope * share,
        gap_slope,
        pull,
        g_logprob * share,
        own,
    )
    return Coefficients(
        torch.stack(values),
        has_slope=upstream.entropy is not None or upstream.kl is not None,
        has_gap=upstream.kl is not None,
        has_pull=upstream.kl_reverse is not None,
    )


def _scaled(tile: Tile, scratch: Scratch, side: Literal["policy", "reference"]) -> Tensor:
    """The scaled logits: the tile's own tensor if no scaling applies, else a scratch buffer."""
    a = _capped(tile, scratch, side)
    divisor = tile.scaling.divisor()
    if isinstance(divisor, Tensor) or divisor != 1.0:
        a = torch.div(a, divisor, out=scratch(side, *a.shape))
    return a


def _capped(tile: Tile, scratch: Scratch, side: Literal["policy", "reference"]) -> Tensor:
    z, bias = (tile.logits, tile.bias) if side == "policy" else (tile.ref_logits, tile.ref_bias)
    assert z is not None
    scaling, a = tile.scaling, z
    out = scratch(side, *z.shape) if _changes(z, bias, tile, scratch) else z
    if z.dtype is not scratch.dtype:
        a = out.copy_(z)
    if bias is not None:
        a = torch.add(a, bias, out=out)
    if bias is not None or tile.may_be_infinite:
        a = torch.clamp(a, min=FLOOR, out=out)
    if scaling.logit_scale != 1.0:
        a = torch.mul(a, scaling.logit_scale, out=out)
    if scaling.softcap is not None:
        a = torch.div(a, scaling.softcap, out=out).tanh_().mul_(scaling.softcap)
    return a


def _changes(z: Tensor, bias: Tensor | None, tile: Tile, scratch: Scratch) -> bool:
    scaled = tile.scaling.logit_scale != 1.0 or tile.scaling.softcap is not None
    return scaled or bias is not None or tile.may_be_infinite or z.dtype is not scratch.dtype


def _through_scaling(gradient: Tensor, tile: Tile, scratch: Scratch) -> Tensor:
    scaling = tile.scaling
    if scaling.softcap is not None:
        capped = _capped(tile, scratch, "policy").div(scaling.softcap)
        gradient.sub_(capped.square_().mul_(gradient))
    if scaling.logit_scale != 1.0:
        gradient.mul_(scaling.logit_scale)
    divisor = scaling.divisor()
    if isinstance(divisor, Tensor) or divisor != 1.0:
        gradient.div_(divisor)
    return gradient


def _target_column(tile: Tile) -> tuple[Tensor, Tensor]:
    """The target's column within the tile `[R, 1]`, and whether it is in the tile `[R]`."""
    local = tile.targets - tile.first
    inside = (local >= 0) & (local < tile.logits.shape[1])
    return torch.where(inside, local, 0)[:, None], inside


def _exp_of_others(shifted: Tensor, column: Tensor, inside: Tensor, out: Tensor) -> Tensor:
    weight = torch.exp(shifted, out=out)
    own = torch.where(inside, 0.0, weight.gather(1, column)[:, 0])
    return weight.scatter_(1, column, own[:, None])


def _dot(first: Tensor, second: Tensor, out: Tensor) -> Tensor:
    """Row sums of the product; `out` may be either factor. (Twice as fast as `vecdot` on a CPU.)"""
    return torch.mul(first, second, out=out).sum(1)
