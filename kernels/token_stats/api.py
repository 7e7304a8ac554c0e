"""`token_stats`, the entry point: checks the arguments and picks a backend and a memory mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rlhf.kernels import backend as backends
from rlhf.kernels.token_stats import ops, reference
from rlhf.kernels.token_stats.inputs import UNKNOWN, check_scaling, wanted_fields
from rlhf.kernels.token_stats.state import FIELDS, IGNORED, NEEDS_REFERENCE, TokenStats

Memory = Literal["auto", "recompute", "keep"]
OFFERED = ("reference", "tiled", "triton")


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    want: Sequence[str] = ("logprob", "entropy"),
    memory: Memory = "auto",
    workspace_bytes: int = 512 << 20,
    group: ProcessGroup | None = None,
    vocab_start: int = 0,
    num_unmasked: int | None = None,
    backend: backends.Backend = "auto",
) -> TokenStats:
    """Statistics of each token's next-token distribution, from last hidden states and LM head, in one pass.

    With a = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature and
    p = softmax(a), and with u, q the same for the reference model (same temperature, softcap and scale):

        logprob = log p[target]      entropy = -sum p log p      logsumexp = log sum exp(a)
        kl = sum p log(p / q)        kl_reverse = sum q log(q / p)        ref_logprob = log q[target]

    all in nats, over the whole vocabulary, from fp32 logits whatever the inputs' precision (float64
    inputs give float64 statistics). The loss may combine any of them: all have gradients to `hidden`,
    `weight` and `bias`, except `ref_logprob`, since the reference model gets no gradients. Differentiating
    twice is an error.

    Shapes: hidden `[N, H]`, weight `[V, H]`, targets `[N]` integers, bias `[V]`, temperature a number or
    `[N]`, ref_hidden `[N, H']`, ref_weight `[V, H']`, ref_bias `[V]`. Without `ref_weight` the reference
    shares the policy's head, bias included.

    A token whose target is -100 is masked: it is dropped before any matmul, and its statistics and gradients
    are 0. Pass `num_unmasked`, the number of the other tokens, if it is known: then the host need not wait
    for a GPU to count them. A target outside the vocabulary is an error on a CPU and gives NaN elsewhere.

    `memory`: "recompute" computes the logits again in backward, within `workspace_bytes`; "keep" stores
    them, 4 N V bytes, and saves a quarter of the arithmetic; "auto" stores them if they fit
    `workspace_bytes`. The results are the same.

    `group`: with a process group, weight and bias are this rank's shard of the vocabulary, rows
    `vocab_start` onwards. Hidden states, targets and upstream gradients must be equal on all ranks.

    Raises ValueError for shapes, precisions, names or backends that cannot work together.
    """
    wanted = wanted_fields(want, has_reference=ref_hidden is not None)
    weight, bias = whole(weight), None if bias is None else whole(bias)
    ref_weight = None if ref_weight is None else whole(ref_weight)
    _check(hidden, weight, targets, bias)
    if NEEDS_REFERENCE & wanted and ref_hidden is not None:
        _check_reference(hidden, weight, ref_hidden, ref_weight, ref_bias)
    check_scaling(temperature, softcap, len(targets))
    check_memory(memory, workspace_bytes)
    chosen = backends.resolve(backend, hidden, offered=OFFERED)
    if chosen == "reference" and group is not None:
        raise ValueError("backend 'reference' needs the whole vocabulary on one rank; use 'tiled'")
    scalar = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    vector = temperature.detach() if isinstance(temperature, Tensor) else None
    count = _count(targets, num_unmasked)
    arguments = ops.Arguments(
        hidden,
        weight,
        bias,
        targets,
        vector,
        None if ref_hidden is None else ref_hidden.detach(),
        None if ref_weight is None else ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach(),
        scalar,
        float(logit_scale),
        None if softcap is None else float(softcap),
        ",".join(sorted(wanted)),
        _keeps(memory, count, hidden, weight, workspace_bytes, both=bool(NEEDS_REFERENCE & wanted)),
        count,
        workspace_bytes,
        "" if group is None else group.group_name,
        vocab_start,
        chosen,
    )
    if chosen == "reference":
        return reference.statistics(arguments)
    outputs = ops.token_stats_op(*arguments)
    return TokenStats(*(outputs[i] if name in wanted else None for i, name in enumerate(FIELDS)))


def whole(weight: Tensor) -> Tensor:
    """The full weight of a head sharded over ranks (a DTensor); its gradient is reduced and scattered."""
    if type(weight) in (Tensor, torch.nn.Parameter):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [N, H] and weight [V, H], got {_shape(hidden)} and {_shape(weight)}"
        )
    if targets.shape != hidden.shape[:1] or targets.is_floating_point():
        raise ValueError(f"expected integer targets [{len(hidden)}], got {targets.dtype} {_shape(targets)}")
    if not hidden.is_floating_point() or hidden.dtype is not weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: convert one, both must have one float type"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias [{len(weight)}], got {_shape(bias)}")
    others = (weight, targets, *((bias,) if bias is not None else ()))
    if any(t.device != hidden.device for t in others):
        raise ValueError(f"hidden is on {hidden.device}, but another input is not: move them together")


def _check_reference(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> None:
    head = weight if ref_weight is None else ref_weight
    if ref_weight is None and ref_bias is not None:
        raise ValueError("ref_bias without ref_weight: the reference shares the policy's head and its bias")
    if ref_hidden.shape != (len(hidden), head.shape[1]) or len(head) != len(weight):
        raise ValueError(
            f"expected ref_hidden [{len(hidden)}, H'] and ref_weight [{len(weight)}, H'], "
            f"got {_shape(ref_hidden)} and {_shape(head)}"
        )
    if ref_bias is not None and ref_bias.shape != weight.shape[:1]:
        raise ValueError(f"expected ref_bias [{len(weight)}], got {_shape(ref_bias)}")
    if ref_hidden.dtype is not head.dtype:
        raise ValueError(f"ref_hidden is {ref_hidden.dtype} and its head {head.dtype}: convert one")
    if (ref_hidden.dtype is torch.float64) != (hidden.dtype is torch.float64):
        raise ValueError(f"hidden is {hidden.dtype} and ref_hidden {ref_hidden.dtype}: float64 needs both")


def check_memory(memory: str, workspace_bytes: int) -> None:
    """Raises ValueError for an unknown memory mode or a workspace of no bytes."""
    if memory not in ("auto", "recompute", "keep"):
        raise ValueError(f"unknown memory mode {memory!r}; choose auto, recompute or keep")
    if workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be above 0, got {workspace_bytes}")


def _count(targets: Tensor, num_unmasked: int | None) -> int:
    if num_unmasked is not None:
        if not 0 <= num_unmasked <= len(targets):
            raise ValueError(f"num_unmasked must lie in [0, {len(targets)}], got {num_unmasked}")
        return num_unmasked
    if torch.compiler.is_compiling():
        return UNKNOWN
    return int((targets != IGNORED).sum())


def _keeps(
    memory: str, num_unmasked: int, hidden: Tensor, weight: Tensor, workspace_bytes: int, *, both: bool
) -> bool:
    """Whether the logits are stored for backward; never without gradients or a known number of tokens."""
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if memory == "recompute" or num_unmasked == UNKNOWN or not learns:
        return False
    itemsize, models = (8 if hidden.dtype is torch.float64 else 4), (2 if both else 1)
    return memory == "keep" or itemsize * num_unmasked * len(weight) * models <= workspace_bytes


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
