"""`logit_stats`: the statistics of `token_stats` from logits that the model has already computed.

It runs the row kernels without the matmuls: forward reads the logits once, backward reads them again and
writes their gradient; nothing else of their size is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.kernels import backend as backends
from rlhf.kernels.token_stats import inputs, reference, rows, tile_sizes
from rlhf.kernels.token_stats.rows import Coefficients, Scaling, Scratch, Tile, Upstream, padded
from rlhf.kernels.token_stats.state import (
    FIELDS,
    IGNORED,
    NEEDS_REFERENCE,
    SAVED_ROWS,
    TokenStats,
    empty_state,
    finish,
)
from rlhf.kernels.token_stats.tile_sizes import Block, Plan


class Arguments(NamedTuple):
    """Arguments of the operators, in their order; `want` is the wanted fields joined by commas."""

    logits: Tensor
    targets: Tensor
    temperature: Tensor | None
    ref_logits: Tensor | None
    scalar_temperature: float
    logit_scale: float
    softcap: float | None
    want: str
    backend: str

    @property
    def wanted(self) -> frozenset[str]:
        """The wanted fields."""
        return frozenset(self.want.split(","))

    @property
    def wide(self) -> torch.dtype:
        """The precision of the statistics."""
        return torch.float64 if self.logits.dtype is torch.float64 else torch.float32


def logit_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logits: Tensor | None = None,
    want: Sequence[str] = ("logprob", "entropy"),
    backend: backends.Backend = "auto",
) -> TokenStats:
    """The statistics of `token_stats` from raw logits `[N, V]`, with gradients to them.

    `ref_logits` `[N, V]` get no gradient. A logit may be minus infinity: its token has probability 0.
    Arithmetic is fp32 (float64 for float64 logits) whatever the logits' precision; the gradient has the
    logits' precision. Tokens whose target is -100 have statistics and gradients 0.

    Raises ValueError for shapes, precisions, names or backends that cannot work together.
    """
    wanted = inputs.wanted_fields(want, has_reference=ref_logits is not None)
    _check(logits, targets, ref_logits)
    inputs.check_scaling(temperature, softcap, len(targets))
    chosen = backends.resolve(backend, logits, offered=("reference", "tiled", "triton"))
    arguments = Arguments(
        logits,
        targets,
        temperature.detach() if isinstance(temperature, Tensor) else None,
        ref_logits.detach() if ref_logits is not None and NEEDS_REFERENCE & wanted else None,
        1.0 if isinstance(temperature, Tensor) else float(temperature),
        float(logit_scale),
        None if softcap is None else float(softcap),
        ",".join(sorted(wanted)),
        chosen,
    )
    if chosen == "reference":
        return _reference(arguments)
    outputs = logit_stats_op(*arguments)
    return TokenStats(*(outputs[i] if name in wanted else None for i, name in enumerate(FIELDS)))


def _check(logits: Tensor, targets: Tensor, ref_logits: Tensor | None) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"expected floating-point logits [N, V], got {logits.dtype} {list(logits.shape)}")
    if targets.shape != logits.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"expected integer targets [{len(logits)}], got {targets.dtype} {list(targets.shape)}"
        )
    if ref_logits is not None and (ref_logits.shape != logits.shape or ref_logits.dtype is not logits.dtype):
        raise ValueError(
            f"expected ref_logits like logits, {logits.dtype} {list(logits.shape)}, "
            f"got {ref_logits.dtype} {list(ref_logits.shape)}"
        )


def _reference(arguments: Arguments) -> TokenStats:
    index = inputs.unmasked_index(arguments.targets, inputs.UNKNOWN)

    def scaled(logits: Tensor) -> Tensor:
        vector = arguments.temperature
        return reference.scaled_logits(
            inputs.gathered(logits, index),
            bias=None,
            temperature=arguments.scalar_temperature if vector is None else inputs.gathered(vector, index),
            softcap=arguments.softcap,
            logit_scale=arguments.logit_scale,
        )

    targets = inputs.gathered(arguments.targets, index)
    inputs.check_targets(targets, arguments.logits.shape[1], "")
    ref_logits = None if arguments.ref_logits is None else scaled(arguments.ref_logits)
    stats = reference.statistics_of(scaled(arguments.logits), targets, ref_logits, arguments.wanted)
    count = len(arguments.targets)
    return TokenStats(
        *(inputs.spread(stats[name], index, count) if name in stats else None for name in FIELDS)
    )


class _UnmaskedRows:
    """The rows of unmasked tokens in tiles that fit a CPU's cache, gathered tile by tile."""

    def __init__(self, arguments: Arguments) -> None:
        self._all = arguments
        self.index = inputs.unmasked_index(arguments.targets, inputs.UNKNOWN)
        self._targets = inputs.gathered(arguments.targets, self.index)
        inputs.check_targets(self._targets, arguments.logits.shape[1], "")
        self.count = len(self._targets)
        height = max(1, min(self.count, tile_sizes.CPU_ROWS))
        step = tile_sizes.COLUMN_STEP
        width = max(step, tile_sizes.CPU_TILE_BYTES // (arguments.wide.itemsize * height) // step * step)
        vocabulary = arguments.logits.shape[1]
        self._plan = Plan(self.count, vocabulary, height, min(width, max(1, vocabulary)))
        size = height * padded(self._plan.columns)
        self.scratch = Scratch(size, arguments.wide, arguments.logits.device)
        vector = arguments.temperature
        self._scaling = Scaling(
            arguments.scalar_temperature
            if vector is None
            else inputs.gathered(vector, self.index).to(arguments.wide),
            arguments.logit_scale,
            arguments.softcap,
        )

    def tiles(self, *, with_reference: bool) -> Iterator[tuple[Block, Tile]]:
        """All tiles, one slice of the vocabulary after the other."""
        for left, right in self._plan.slices():
            for block in self._plan.blocks(left, right):
                ref_logits = self._all.ref_logits if with_reference else None
                tile = Tile(
                    self.cut(self._all.logits, block),
                    left,
                    self._targets[block.top : block.bottom],
                    self._scaling.rows(block.top, block.bottom),
                    ref_logits=None if ref_logits is None else self.cut(ref_logits, block),
                    may_be_infinite=True,
                )
                yield block, tile

    def cut(self, logits: Tensor, block: Block) -> Tensor:
        """The block of `logits`, whose rows count the unmasked tokens only."""
        columns = logits[:, block.left : block.right]
        index = self.index
        return (
            columns[block.top : block.bottom] if index is None else columns[index[block.top : block.bottom]]
        )

    def put(self, values: Tensor, block: Block, into: Tensor) -> None:
        """Stores a tile of unmasked rows at its place in `into`, which has all rows."""
        columns = into[:, block.left : block.right]
        if self.index is None:
            columns[block.top : block.bottom] = values
        else:
            columns[self.index[block.top : block.bottom]] = values


def _whole_tile(arguments: Arguments) -> Tile:
    """All rows and columns as one tile for the Triton kernels, masked rows included."""
    temperature = arguments.temperature
    if temperature is None:
        temperature = torch.full(
            arguments.targets.shape, arguments.scalar_temperature, device=arguments.logits.device
        )
    scaling = Scaling(temperature.float(), arguments.logit_scale, arguments.softcap)
    return Tile(
        arguments.logits.contiguous(),
        0,
        arguments.targets,
        scaling,
        ref_logits=None if arguments.ref_logits is None else arguments.ref_logits.contiguous(),
        may_be_infinite=True,
    )


def _forward(*values: Any) -> tuple[Tensor, ...]:
    """The six statistics `[N]` (empty where not wanted), and `[SAVED_ROWS, N]` for backward."""
    arguments = Arguments(*values)
    entropy, count = "entropy" in arguments.wanted, len(arguments.targets)
    device = arguments.logits.device
    with torch.autocast(device.type, enabled=False):
        if arguments.backend == "triton":
            from rlhf.kernels.token_stats.triton_rows import TritonRows

            state = empty_state(count, dtype=arguments.wide, device=device)
            whole = _whole_tile(arguments)
            TritonRows().fold(state, whole, entropy=entropy, scratch=Scratch(0, arguments.wide, device))
            stats, saved = finish(state, arguments.wanted)
            stats = {k: v.masked_fill(arguments.targets == IGNORED, 0.0) for k, v in stats.items()}
        else:
            unmasked = _UnmaskedRows(arguments)
            state = empty_state(unmasked.count, dtype=arguments.wide, device=device)
            for block, tile in unmasked.tiles(with_reference=True):
                part = state[:, block.top : block.bottom]
                rows.fold(part, tile, entropy=entropy, scratch=unmasked.scratch)
            stats, saved = finish(state, arguments.wanted)
            stats = {k: inputs.spread(v, unmasked.index, count) for k, v in stats.items()}
            saved = torch.nn.functional.pad(saved, (0, count - unmasked.count))
    return (*(stats[name] if name in stats else saved.new_empty(0) for name in FIELDS), saved)


def _forward_shapes(*values: Any) -> tuple[Tensor, ...]:
    arguments = Arguments(*values)
    count = arguments.targets.shape[0]

    def made(*shape: int) -> Tensor:
        return arguments.logits.new_empty(shape, dtype=arguments.wide)

    return (*(made(count if n in arguments.wanted else 0) for n in FIELDS), made(SAVED_ROWS, count))


def _backward(*values: Any) -> Tensor:
    """The gradient by the logits, `[N, V]`."""
    count = len(Arguments._fields)
    arguments = Arguments(*values[:count])
    saved, *gradients = values[count:]
    with torch.autocast(arguments.logits.device.type, enabled=False):
        if arguments.backend == "triton":
            coefficients = rows.coefficients(saved, _upstream(gradients, None, saved.dtype))
            return _whole_gradient(arguments, coefficients)
        unmasked = _UnmaskedRows(arguments)
        upstream = _upstream(gradients, unmasked.index, saved.dtype)
        coefficients = rows.coefficients(saved[:, : unmasked.count], upstream)
        result = torch.zeros_like(arguments.logits, memory_format=torch.contiguous_format)
        for block, tile in unmasked.tiles(with_reference=upstream.needs_reference):
            part = coefficients.rows(block.top, block.bottom)
            unmasked.put(rows.gradient(tile, part, scratch=unmasked.scratch).to(result.dtype), block, result)
    return result


def _upstream(gradients: list[Tensor | None], index: Tensor | None, dtype: torch.dtype) -> Upstream:
    return Upstream(*(None if g is None else inputs.gathered(g, index).to(dtype) for g in gradients))


def _whole_gradient(arguments: Arguments, coefficients: Coefficients) -> Tensor:
    from rlhf.kernels.token_stats.triton_rows import TritonRows

    tile = _whole_tile(arguments)
    result = torch.empty_like(tile.logits)
    ref_logits = tile.logits if tile.ref_logits is None else tile.ref_logits
    TritonRows().write_gradient(tile, tile.logits, ref_logits, coefficients, result, in_place=False)
    return result


def _backward_shapes(*values: Any) -> Tensor:
    return torch.empty_like(values[0], memory_format=torch.contiguous_format)


_ARGUMENTS = (
    "Tensor logits, Tensor targets, Tensor? temperature, Tensor? ref_logits, float scalar_temperature, "
    "float logit_scale, float? softcap, str want, str backend"
)
_OUTPUTS = ", ".join(["Tensor"] * (len(FIELDS) + 1))

logit_stats_op: Any = torch.library.custom_op(
    "rlhf::logit_stats", _forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> ({_OUTPUTS})"
)
logit_stats_op.register_fake(_forward_shapes)

logit_stats_backward_op: Any = torch.library.custom_op(
    "rlhf::logit_stats_backward",
    _backward,
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor saved, Tensor? d_logprob, Tensor? d_entropy, Tensor? d_logsumexp, "
    "Tensor? d_kl, Tensor? d_kl_reverse) -> Tensor",
)
logit_stats_backward_op.register_fake(_backward_shapes)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], output[-1])
    ctx.options = inputs[4:]


def _differentiate(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, saved = ctx.saved_tensors
    # the last statistic, the reference's log-probability, has no gradient
    used = upstream[: len(FIELDS) - 1]
    nothing: list[Tensor | None] = [None] * (len(Arguments._fields) - 1)
    if not ctx.needs_input_grad[0] or all(g is None for g in used):
        return (None, *nothing)
    return (logit_stats_backward_op(*tensors, *ctx.options, saved, *used), *nothing)


logit_stats_op.register_autograd(_differentiate, setup_context=_setup)
