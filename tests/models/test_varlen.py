"""The attention for GPUs, tested on the CPU: its index arithmetic and the arguments of its kernel calls."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.models.layers import shared_prefix as attention
from rlhf.models.layers import varlen
from rlhf.models.layers.shared_prefix import attention_by_groups
from rlhf.models.layers.varlen import Sequences, choose, packed_attention, sequences_of
from rlhf.models.packing import GroupSpan

HEADS, KV_HEADS, DIM = 4, 2, 8
GROUPS = st.lists(
    st.tuples(st.integers(1, 20), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=4
)


def spans_of(groups: list[tuple[int, list[int]]]) -> tuple[GroupSpan, ...]:
    spans: list[GroupSpan] = []
    for prompt, completions in groups:
        start = spans[-1].end if spans else 0
        spans.append(GroupSpan(start, prompt, tuple(completions)))
    return tuple(spans)


def problem(spans: tuple[GroupSpan, ...], **kind: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = HEADS, KV_HEADS, KV_HEADS
    shapes = [(heads, spans[-1].end, DIM) for heads in sizes]
    parts = [torch.randn(s, generator=generator, dtype=torch.float64).to(**kind) for s in shapes]
    return [t.requires_grad_() for t in parts]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, spans: tuple[GroupSpan, ...], window: int | None) -> Tensor:
    """softmax(q k / sqrt(D)) v, one token at a time: each sees its prompt and its own completion so far."""
    rows: list[Tensor] = []
    for span in spans:
        prompt = list(range(span.start, span.start + span.prompt))
        seen_by = [prompt[: i + 1] for i in range(span.prompt)]
        begin = span.start + span.prompt
        for length in span.completions:
            seen_by += [[*prompt, *range(begin, begin + i + 1)] for i in range(length)]
            begin += length
        for token, seen in enumerate(seen_by, start=span.start):
            seen = seen if window is None else seen[-window:]
            keys, values = (t[:, seen].repeat_interleave(HEADS // KV_HEADS, 0) for t in (k, v))
            weights = (torch.einsum("hd,hld->hl", q[:, token], keys) / DIM**0.5).softmax(-1)
            rows.append(torch.einsum("hl,hld->hd", weights, values))
    return torch.stack(rows, dim=1)


def output_and_gradients(attention: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    output = attention(*tensors)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    gradients = torch.autograd.grad((output * weights.view_as(output)).sum(), tensors)
    return [output.detach(), *gradients]


@settings(max_examples=25, deadline=None)
@given(groups=GROUPS, window=st.none() | st.integers(1, 25))
def test_packed_sequences_see_what_each_token_should_see(
    groups: list[tuple[int, list[int]]], window: int | None
):
    spans = spans_of(groups)
    tensors = problem(spans)
    packed = partial(packed_attention, spans=spans, scale=None, window=window, kernel="sdpa")
    expected = output_and_gradients(partial(one_by_one, spans=spans, window=window), tensors)
    for got, want in zip(output_and_gradients(packed, tensors), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@settings(max_examples=10, deadline=None)
@given(groups=GROUPS)
def test_the_attention_for_gpus_and_that_for_cpus_agree(groups: list[tuple[int, list[int]]]):
    spans = spans_of(groups)
    tensors = problem(spans)
    gpu = partial(packed_attention, spans=spans, scale=0.3, kernel="sdpa")
    cpu = partial(attention_by_groups, spans=spans, scale=0.3)
    for got, want in zip(output_and_gradients(gpu, tensors), output_and_gradients(cpu, tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wide_up_to", [0, 512])
@pytest.mark.parametrize("fold_up_to", [0, 256])
def test_in_16_bits_the_cpu_is_no_further_from_the_truth_than_its_kernel_is(
    monkeypatch: pytest.MonkeyPatch, wide_up_to: int, fold_up_to: int
):
    """Root mean square over output and each gradient; computed in float32 it is nearer."""
    monkeypatch.setattr(attention, "FLOAT32_UP_TO", wide_up_to)
    monkeypatch.setattr(attention, "FOLD_UP_TO", fold_up_to)
    spans = spans_of([(40, [30, 7, 19]), (70, [64] * 4), (3, [50]), (1, [2, 1])])
    tensors = [t.detach().bfloat16().requires_grad_() for t in problem(spans)]
    plain = partial(packed_attention, spans=spans, scale=None, kernel="sdpa")
    truth = output_and_gradients(plain, [t.detach().double().requires_grad_() for t in tensors])

    def errors(found: list[Tensor]) -> list[float]:
        return [((f - t).norm() / t.norm()).item() for f, t in zip(found, truth, strict=True)]

    kernel_errors = errors(output_and_gradients(plain, tensors))
    own = errors(output_and_gradients(partial(attention_by_groups, spans=spans, scale=None), tensors))
    allowed = 1.0 if wide_up_to else 1.25
    assert all(0 < a <= allowed * b for a, b in zip(own, kernel_errors, strict=True))


def test_sequences_by_hand():
    sequences = sequences_of(spans_of([(2, [1, 2]), (1, [2])]), torch.device("cpu"))
    # prompt 0 1, completions 2 and 3 4; then 5 6 7, a prompt and its only completion
    assert sequences.keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 7]
    assert sequences.query_ends.tolist() == [0, 2, 3, 5, 8]
    assert sequences.key_ends.tolist() == [0, 2, 5, 9, 12]
    assert sequences.copies
    alone = sequences_of(spans_of([(1, [2]), (3, [1])]), torch.device("cpu"))
    assert not alone.copies and alone.keys.tolist() == list(range(7))


def test_the_choice_of_a_kernel_says_why_it_cannot_be_had():
    query = torch.zeros(HEADS, 3, DIM)
    assert choose(query) is varlen.by_sdpa
    for name in ("flash-attn-3", "flash-attn-2", "torch-varlen"):
        with pytest.raises(ValueError, match=f"{name}' cannot be used: it needs CUDA tensors"):
            choose(query, name)
    with pytest.raises(ValueError, match="choose one of auto, flash-attn-3"):
        choose(query, "flash")


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((8, 0), "of compute capability 9.x, this one has 8.0"), ((9, 0), None), ((10, 0), "this one has 10.0")],
)
def test_flash_attention_3_is_for_hopper_alone_and_2_for_all_that_is_newer_than_volta(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str | None
):
    package = SimpleNamespace(flash_attn_varlen_func=len)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    monkeypatch.setattr(importlib, "import_module", lambda name: package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    third, second = (varlen.KERNELS[name]() for name in ("flash-attn-3", "flash-attn-2"))
    assert callable(second)
    assert callable(third) if reason is None else isinstance(third, str) and third.endswith(reason)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    found = varlen.KERNELS["flash-attn-2"]()
    assert found == "needs a GPU of compute capability 8.0 or more, this one has 7.5"


def split_call(q: Tensor, k: Tensor, v: Tensor, ends: list[Tensor], longest: list[int], **how: Any) -> Tensor:
    """What a varlen kernel computes from its arguments, which are checked as it would."""
    lengths = [tuple(e.diff().tolist()) for e in ends]
    for end, total, most, length in zip(ends, (len(q), len(k)), longest, lengths, strict=True):
        assert end.dtype == torch.int32 and end[0] == 0 and end[-1] == total and most == max(length)
    assert all(t.is_contiguous() for t in (q, k, v)) and q.shape[1] == HEADS and k.shape[1] == KV_HEADS
    left, right = how["window"]
    assert how["causal"] or right == 0
    sequences = Sequences(torch.arange(len(k)), ends[0], ends[1], lengths[0], lengths[1])
    return varlen.by_sdpa(q, k, v, sequences, how["scale"], None if left < 0 else left + 1)


def test_the_call_of_torchs_kernel_has_its_arguments(monkeypatch: pytest.MonkeyPatch):
    real = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def stand_in(*args: Any, **kwargs: Any) -> Tensor:
        call = inspect.signature(real).bind(*args, **kwargs).arguments
        ends, longest = [call["cu_seq_q"], call["cu_seq_k"]], [call["max_q"], call["max_k"]]
        assert call["enable_gqa"]
        return split_call(
            call["query"],
            call["key"],
            call["value"],
            ends,
            longest,
            scale=call["scale"],
            window=call["window_size"],
            causal=call["window_size"] == (-1, 0),
        )

    assert_stands_in(monkeypatch, partial(varlen._by_torch, stand_in))


def test_the_call_of_flash_attn_has_its_arguments(monkeypatch: pytest.MonkeyPatch):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size
    ) -> Tensor:
        """The arguments that versions 2 and 3 share, as their documentation names them."""
        ends, longest = [cu_seqlens_q, cu_seqlens_k], [max_seqlen_q, max_seqlen_k]
        return split_call(q, k, v, ends, longest, scale=softmax_scale, window=window_size, causal=causal)

    assert_stands_in(monkeypatch, partial(varlen._by_flash_attn, flash_attn_varlen_func))


def assert_stands_in(monkeypatch: pytest.MonkeyPatch, kernel: varlen.Kernel) -> None:
    spans = spans_of([(5, [3, 1, 4]), (2, [2]), (7, [1, 1])])
    tensors = problem(spans)
    for window in (None, 4):
        expected = output_and_gradients(partial(one_by_one, spans=spans, window=window), tensors)
        monkeypatch.setattr(varlen, "choose", lambda query, name: kernel)
        packed = partial(packed_attention, spans=spans, scale=None, window=window)
        for got, want in zip(output_and_gradients(packed, tensors), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(varlen.KERNELS))
@pytest.mark.parametrize("window", [None, 40])
def test_on_a_gpu_each_kernel_is_no_further_from_the_truth_than_sequence_by_sequence(
    name: str, window: int | None
):
    spans = spans_of([(130, [30, 7, 64]), (3, [17]), (300, [1, 90, 33, 20])])
    cuda: list[Tensor] = problem(spans, device="cuda", dtype=torch.bfloat16)
    try:
        choose(cuda[0], name)
    except ValueError as error:
        pytest.skip(str(error))
    exact = [t.detach().double().requires_grad_() for t in cuda]
    truth, plain, fast = (
        output_and_gradients(
            partial(packed_attention, spans=spans, scale=None, window=window, kernel=kernel), tensors
        )
        for kernel, tensors in (("sdpa", exact), ("sdpa", cuda), (name, cuda))
    )
    for got, same, want in zip(fast, plain, truth, strict=True):
        error, allowed = ((t.double() - want).square().mean().sqrt() for t in (got, same))
        assert error <= 1.5 * allowed
