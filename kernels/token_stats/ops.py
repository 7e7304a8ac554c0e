"""Registers the tiled and Triton backends as PyTorch operators, whose shapes torch.compile can trace.

`rlhf::token_stats` returns the statistics of all N tokens and what backward needs. Masked tokens are
dropped inside it, so that no shape depends on data. `rlhf::token_stats_backward` is its derivative, which
has no derivative of its own: differentiating twice is an error.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.kernels.token_stats import tiled
from rlhf.kernels.token_stats.inputs import UNKNOWN, check_targets, gathered, spread, unmasked_index
from rlhf.kernels.token_stats.parallel import merge_over_ranks
from rlhf.kernels.token_stats.rows import Scaling, Upstream, padded
from rlhf.kernels.token_stats.state import FIELDS, NEEDS_REFERENCE, SAVED_ROWS, finish
from rlhf.kernels.token_stats.tile_sizes import Head, StatsInputs


class Arguments(NamedTuple):
    """Arguments of both operators, in their order; `want` is the wanted fields joined by commas."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    scalar_temperature: float
    logit_scale: float
    softcap: float | None
    want: str
    keep: bool
    num_unmasked: int
    workspace_bytes: int
    group: str
    vocab_start: int
    backend: str

    @property
    def wanted(self) -> frozenset[str]:
        """The wanted fields."""
        return frozenset(self.want.split(","))

    @property
    def rows(self) -> int:
        """The number of columns saved for backward: the unmasked tokens if their number is known, else N."""
        return len(self.targets) if self.num_unmasked == UNKNOWN else self.num_unmasked


_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? temperature, Tensor? ref_hidden, "
    "Tensor? ref_weight, Tensor? ref_bias, float scalar_temperature, float logit_scale, float? softcap, "
    "str want, bool keep, SymInt num_unmasked, SymInt workspace_bytes, str group, SymInt vocab_start, "
    "str backend"
)
_OUTPUTS = ", ".join(["Tensor"] * (len(FIELDS) + 3))


def _forward(*values: Any) -> tuple[Tensor, ...]:
    """The six statistics `[N]` (empty where not wanted), saved rows, and kept logits of both models."""
    arguments = Arguments(*values)
    with torch.autocast(arguments.hidden.device.type, enabled=False):
        index = unmasked_index(arguments.targets, arguments.num_unmasked)
        unmasked = _unmasked_inputs(arguments, index)
        check_targets(unmasked.targets, unmasked.vocabulary, arguments.group)
        state, kept, ref_kept = tiled.forward(unmasked, row_kernels(arguments.backend), keep=arguments.keep)
        if arguments.group:
            state = merge_over_ranks(state, arguments.group)
        stats, saved = finish(state, arguments.wanted)
        count = len(arguments.targets)
        fields = [
            spread(stats[name], index, count) if name in stats else saved.new_empty(0) for name in FIELDS
        ]
        unused = arguments.rows - saved.shape[1]
        if unused:
            saved = torch.nn.functional.pad(saved, (0, unused))
    return (*fields, saved, kept, ref_kept)


def _forward_shapes(*values: Any) -> tuple[Tensor, ...]:
    arguments = Arguments(*values)
    wide = torch.float64 if arguments.hidden.dtype is torch.float64 else torch.float32
    size = arguments.rows * padded(arguments.weight.shape[0]) if arguments.keep else 0
    ref_size = size if NEEDS_REFERENCE & arguments.wanted else 0

    def made(*shape: int) -> Tensor:
        return arguments.hidden.new_empty(shape, dtype=wide)

    fields = [made(arguments.targets.shape[0] if name in arguments.wanted else 0) for name in FIELDS]
    return (*fields, made(SAVED_ROWS, arguments.rows), made(size), made(ref_size))


def _backward(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by hidden, weight and bias; an empty tensor where none is needed."""
    count = len(Arguments._fields)
    arguments = Arguments(*values[:count])
    saved, kept, ref_kept, *upstream, need_hidden, need_weight, need_bias = values[count:]
    with torch.autocast(arguments.hidden.device.type, enabled=False):
        index = unmasked_index(arguments.targets, arguments.num_unmasked)
        unmasked = _unmasked_inputs(arguments, index)
        own = [None if g is None else gathered(g, index).to(saved.dtype) for g in upstream]
        gradients = tiled.backward(
            unmasked,
            row_kernels(arguments.backend),
            saved[:, : len(unmasked.targets)],
            Upstream(*own),
            (kept, ref_kept),
            tiled.Needs(need_hidden, need_weight, need_bias),
            arguments.group,
        )
        empty = arguments.hidden.new_empty(0)
        d_hidden = empty
        if gradients.hidden is not None:
            d_hidden = spread(gradients.hidden, index, len(arguments.targets))
    return (
        d_hidden,
        empty.clone() if gradients.weight is None else gradients.weight,
        empty.clone() if gradients.bias is None else gradients.bias,
    )


def _backward_shapes(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments = Arguments(*values[: len(Arguments._fields)])
    inputs = (arguments.hidden, arguments.weight, arguments.bias)
    hidden, weight, bias = (
        t.new_empty(t.shape) if need and t is not None else arguments.hidden.new_empty(0)
        for t, need in zip(inputs, values[-3:], strict=True)
    )
    return hidden, weight, bias


token_stats_op: Any = torch.library.custom_op(
    "rlhf::token_stats", _forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> ({_OUTPUTS})"
)
token_stats_op.register_fake(_forward_shapes)

token_stats_backward_op: Any = torch.library.custom_op(
    "rlhf::token_stats_backward",
    _backward,
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor saved, Tensor kept, Tensor ref_kept, Tensor? d_logprob, "
    "Tensor? d_entropy, Tensor? d_logsumexp, Tensor? d_kl, Tensor? d_kl_reverse, bool need_hidden, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
)
token_stats_backward_op.register_fake(_backward_shapes)

_TENSORS = ("hidden", "weight", "bias", "targets", "temperature", "ref_hidden", "ref_weight", "ref_bias")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: len(_TENSORS)], *output[len(FIELDS) :])
    ctx.options = inputs[len(_TENSORS) :]


def _differentiate(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    tensors, rest = saved[: len(_TENSORS)], saved[len(_TENSORS) :]
    needs = tuple(ctx.needs_input_grad[:3])
    # the last statistic, the reference's log-probability, has no gradient
    used = upstream[: len(FIELDS) - 1]
    result: list[Tensor | None] = [None] * len(Arguments._fields)
    if any(needs) and any(g is not None for g in used):
        made = token_stats_backward_op(*tensors, *ctx.options, *rest, *used, *needs)
        result[:3] = [g if need else None for g, need in zip(made, needs, strict=True)]
    return tuple(result)


token_stats_op.register_autograd(_differentiate, setup_context=_setup)


def _unmasked_inputs(arguments: Arguments, index: Tensor | None) -> StatsInputs:
    def rows(tensor: Tensor) -> Tensor:
        return gathered(tensor, index)

    policy = Head(rows(arguments.hidden), arguments.weight, arguments.bias)
    reference = None
    if NEEDS_REFERENCE & arguments.wanted:
        assert arguments.ref_hidden is not None
        shared = arguments.ref_weight is None
        reference = Head(
            rows(arguments.ref_hidden),
            arguments.weight if arguments.ref_weight is None else arguments.ref_weight,
            arguments.bias if shared else arguments.ref_bias,
        )
    temperature: float | Tensor = arguments.scalar_temperature
    if arguments.temperature is not None:
        temperature = rows(arguments.temperature).to(policy.wide)
    elif arguments.backend == "triton":
        temperature = policy.hidden.new_full((len(policy.hidden),), temperature, dtype=policy.wide)
    return StatsInputs(
        policy,
        reference,
        rows(arguments.targets),
        Scaling(temperature, arguments.logit_scale, arguments.softcap),
        "entropy" in arguments.wanted,
        arguments.vocab_start,
        arguments.workspace_bytes,
    )


def row_kernels(backend: str) -> tiled.RowKernels:
    """The row kernels of a backend that `resolve` returned."""
    if backend == "triton":
        from rlhf.kernels.token_stats.triton_rows import TritonRows

        return TritonRows()
    return tiled.TorchRows()
