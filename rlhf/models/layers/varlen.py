"""Attention over packed sequences on a GPU: one kernel call for all groups, without padding.

Each prompt is a sequence whose keys are its own tokens. Each completion is a sequence whose queries are its
own tokens and whose keys are those of its prompt followed by its own. So the keys and values of a prompt are
copied for each completion, the mask is causal and aligned to the last key, and autograd sums the gradients of
the copies. The copies are not kept for the backward pass but made again there.

The kernel is the first of `KERNELS` that can serve the tensors: FlashAttention 3, FlashAttention 2, torch's
own varlen attention, and a loop over sequences with `scaled_dot_product_attention`, which serves all tensors
on any device and is the specification of the others. **Only that loop has been run** (the tests compare it
with the CPU's function); the other three are written against their documentation.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from rlhf.models.packing import GroupSpan


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """S sequences of queries and the keys that they see. Queries stay in packed order, keys are gathered."""

    keys: Tensor
    """`[K]`: the packed tokens that are keys, sequence by sequence; a prompt is there for each completion."""
    query_ends: Tensor
    """int32 `[S + 1]`, from 0: sequence i has the queries from `query_ends[i]` to `query_ends[i + 1]`."""
    key_ends: Tensor
    """int32 `[S + 1]`: the same for the keys."""
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]

    @property
    def copies(self) -> bool:
        """Whether some token is a key of several sequences."""
        return sum(self.key_lengths) > sum(self.query_lengths)


@lru_cache(maxsize=8)
def sequences_of(spans: tuple[GroupSpan, ...], device: torch.device) -> Sequences:
    """The sequences of packed groups: prompts and completions; a group of one completion is one sequence."""
    queries: list[int] = []
    keys: list[Tensor] = []
    for span in spans:
        prompt = torch.arange(span.start, span.start + span.prompt)
        if len(span.completions) == 1:
            queries.append(span.end - span.start)
            keys.append(torch.arange(span.start, span.end))
            continue
        queries.append(span.prompt)
        keys.append(prompt)
        begin = span.start + span.prompt
        for length in span.completions:
            queries.append(length)
            keys.append(torch.cat([prompt, torch.arange(begin, begin + length)]))
            begin += length
    lengths = [len(k) for k in keys]

    def ends(parts: Sequence[int]) -> Tensor:
        return torch.tensor([0, *accumulate(parts)], dtype=torch.int32, device=device)

    return Sequences(torch.cat(keys).to(device), ends(queries), ends(lengths), tuple(queries), tuple(lengths))


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: tuple[GroupSpan, ...],
    *,
    scale: float | None,
    window: int | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Attention of packed groups: query `[heads, T, D]`, key and value `[kv_heads, T, D]` -> `[heads, T, D]`.

    `window`: how many tokens a token sees, itself included; None: all before it. `kernel`: a name of
    `KERNELS` or "auto". Raises ValueError, with the reason, when the named kernel cannot serve the tensors.
    """
    sequences = sequences_of(spans, query.device)
    attend = choose(query, kernel)
    factor = query.shape[-1] ** -0.5 if scale is None else scale

    def attend_to_copies(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if sequences.copies:
            k, v = k[sequences.keys], v[sequences.keys]
        return attend(q, k, v, sequences, factor, window)

    tensors = [t.transpose(0, 1).contiguous() for t in (query, key, value)]  # [T, heads, D]
    if sequences.copies and torch.is_grad_enabled():
        # copies of the keys and values are made again in the backward pass
        output = cast(Any, checkpoint)(
            attend_to_copies, *tensors, use_reentrant=False, preserve_rng_state=False
        )
        return cast(Tensor, output).transpose(0, 1)
    return attend_to_copies(*tensors).transpose(0, 1)


Kernel = Callable[[Tensor, Tensor, Tensor, Sequences, float, int | None], Tensor]
"""`(query[T, heads, D], key[K, kv_heads, D], value[K, kv_heads, D], sequences, scale, window) -> [T, ...]`"""


def by_sdpa(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float, window: int | None
) -> Tensor:
    """One call of `scaled_dot_product_attention` for each sequence."""
    outputs: list[Tensor] = []
    queries = torch.split(query, list(sequences.query_lengths))
    keys, values = (torch.split(t, list(sequences.key_lengths)) for t in (key, value))
    for q, k, v in zip(queries, keys, values, strict=True):
        outputs.append(one_sequence(*(t.transpose(0, 1) for t in (q, k, v)), scale=scale, window=window))
    return torch.cat(outputs, dim=1).transpose(0, 1)


def one_sequence(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int | None) -> Tensor:
    """Causal attention of one sequence: query `[heads, L, D]`, key and value `[kv_heads, M, D]`, M >= L.

    The queries are the last L of the M tokens.
    """
    length, seen = q.shape[1], k.shape[1]  # L, M
    k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
    plain = length == seen and (window is None or window >= seen)
    mask = None
    if not plain:
        # aligned to the last key: query i sees keys up to i + M - L
        mask = torch.ones(length, seen, dtype=torch.bool, device=q.device).tril(seen - length)
        mask = mask if window is None else mask.triu(seen - length - window + 1)
    # with three dimensions instead of four, torch would compute plain matrix products
    out = F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, is_causal=plain, scale=scale
    )
    return out[0]


def _by_flash_attn(
    function: Any, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float, window: int | None
) -> Tensor:
    """Calls `flash_attn_varlen_func` of FlashAttention 2 (from 2.1) or 3: causal, aligned to the last key."""
    output: Any = function(
        q,
        k,
        v,
        cu_seqlens_q=sequences.query_ends,
        cu_seqlens_k=sequences.key_ends,
        max_seqlen_q=max(sequences.query_lengths),
        max_seqlen_k=max(sequences.key_lengths),
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    # earlier versions of FlashAttention 3 return a tuple of output and log-sum-exp
    return cast(Any, output)[0] if isinstance(output, tuple) else output


def _by_torch(
    function: Any, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float, window: int | None
) -> Tensor:
    """Calls `torch.nn.attention.varlen.varlen_attn`, causal because its window has nothing to the right."""
    return function(
        q,
        k,
        v,
        sequences.query_ends,
        sequences.key_ends,
        max(sequences.query_lengths),
        max(sequences.key_lengths),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )


def _flash_attn(module: str, package: str, *, least: int, most: int | None = None) -> Kernel | str:
    """The kernel of a package, or the reason why it cannot be had.

    `least`, `most`: the first numbers of the compute capabilities that the package has kernels for.
    """
    if importlib.util.find_spec(module) is None:
        return f"the package {package} is not installed"
    major, minor = torch.cuda.get_device_capability()
    if major < least or (most is not None and major > most):
        wanted = f"{least}.x" if most == least else f"{least}.0 or more"
        return f"needs a GPU of compute capability {wanted}, this one has {major}.{minor}"
    return partial(_by_flash_attn, importlib.import_module(module).flash_attn_varlen_func)


def _torch_varlen() -> Kernel | str:
    """Torch's own kernel, or the reason why it cannot be had."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    missing = {"scale", "window_size", "enable_gqa"} - set(inspect.signature(function).parameters)
    if missing:
        return f"varlen_attn of torch {torch.__version__} does not take {', '.join(sorted(missing))}"
    if torch.cuda.get_device_capability()[0] < 8:
        return "needs a GPU of compute capability 8.0"
    return partial(_by_torch, function)


KERNELS: dict[str, Callable[[], Kernel | str]] = {
    "flash-attn-3": lambda: _flash_attn("flash_attn_interface", "flash-attn 3", least=9, most=9),
    "flash-attn-2": lambda: _flash_attn("flash_attn", "flash-attn", least=8),
    "torch-varlen": _torch_varlen,
    "sdpa": lambda: by_sdpa,
}
"""For each name, a function that returns the kernel, or the reason why it cannot be used here."""


@cache
def _found(name: str) -> Kernel | str:
    return KERNELS[name]()


def choose(query: Tensor, kernel: str = "auto") -> Kernel:
    """The kernel of that name; for "auto" the first that can serve `query`.

    Raises ValueError: there is no kernel of that name, or it cannot serve `query` (the message says why).
    """
    if kernel != "auto" and kernel not in KERNELS:
        raise ValueError(f"there is no attention kernel {kernel!r}; choose one of auto, {', '.join(KERNELS)}")
    for name in KERNELS if kernel == "auto" else (kernel,):
        found = _cannot_serve(query) if name != "sdpa" else None
        found = found or _found(name)
        if not isinstance(found, str):
            return found
        if name == kernel:
            raise ValueError(f"attention kernel {name!r} cannot be used: {found}; use 'sdpa' or 'auto'")
    raise AssertionError("sdpa serves everything")


def _cannot_serve(query: Tensor) -> str | None:
    """The reason why no flash kernel can serve `query`; None when they can."""
    if not query.is_cuda:
        return f"it needs CUDA tensors, got one on {query.device}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, got {query.dtype}"
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        return f"it takes head sizes that are a multiple of 8 up to 256, got {query.shape[-1]}"
    return None
