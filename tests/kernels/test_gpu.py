"""Tests on a GPU: the compiled row kernels, mixed-precision matmuls, equal bits, synchronisation, memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from rlhf.kernels.backend import Backend
from rlhf.kernels.gae import gae
from rlhf.kernels.token_stats import IGNORED, token_stats
from tests.kernels.cases import FIELDS, Case, assert_close, assert_no_worse, exact, make_case, measured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TENSORS = ("hidden", "weight", "targets", "bias", "temperature", "ref_hidden", "ref_weight", "ref_bias")


@pytest.fixture(autouse=True)
def full_fp32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(case: Case) -> Case:
    moved = {name: value.cuda() for name in TENSORS if isinstance(value := getattr(case, name), torch.Tensor)}
    return replace(case, **moved, upstream={k: v.cuda() for k, v in case.upstream.items()})


def to_cpu(result: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in result.items()}


@pytest.mark.parametrize("backend", ["triton", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 97, 4096, 4097, 10007])
@pytest.mark.parametrize("everything", [False, True])
def test_it_is_never_further_from_the_truth_than_plain_pytorch(
    backend: Backend, dtype: torch.dtype, vocabulary: int, everything: bool
) -> None:
    case = make_case(
        33,
        64,
        vocabulary,
        dtype=dtype,
        bias=everything,
        softcap=20.0 if everything else None,
        vector_temperature=everything,
        masked=0.3 if everything else 0.0,
        logit_scale=0.25,
    )
    truth = exact(case)
    plain = to_cpu(measured(on_gpu(case), backend="reference"))
    fast = to_cpu(measured(on_gpu(case), backend=backend, workspace_bytes=1 << 20))
    # 16-bit logit gradients enter the matmuls rounded: half a unit in the last place of each
    slack = 6e-6 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
    statistics = {name: truth[name] for name in FIELDS}
    assert_no_worse(fast, plain, statistics, slack=6e-6)
    assert_no_worse(fast, plain, truth, slack=slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_the_logits_gives_the_same_bits_as_computing_them_again(dtype: torch.dtype) -> None:
    case = on_gpu(make_case(300, 64, 5003, dtype=dtype, bias=True))
    kept, again = (
        measured(case, backend="triton", memory=m, workspace_bytes=1 << 21) for m in ("keep", "recompute")
    )
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_two_runs_give_the_same_bits() -> None:
    case = on_gpu(make_case(300, 64, 5003, dtype=torch.bfloat16))
    first, second = (measured(case, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_permuting_tokens_permutes_the_statistics_bit_for_bit() -> None:
    case = on_gpu(make_case(256, 64, 5003, dtype=torch.bfloat16, vector_temperature=True))
    order = torch.randperm(256, device="cuda")
    per_token = ("hidden", "targets", "temperature", "ref_hidden")
    moved = replace(case, **{name: getattr(case, name)[order] for name in per_token})
    first, second = (measured(c, backend="triton") for c in (case, moved))
    assert all(torch.equal(first[name][order], second[name]) for name in FIELDS)


def test_the_host_never_waits_where_the_number_of_kept_tokens_is_known() -> None:
    case = on_gpu(make_case(64, 64, 5003, dtype=torch.bfloat16, masked=0.4))
    number = int((case.targets != IGNORED).sum())
    measured(case, backend="triton", num_unmasked=number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        measured(case, backend="triton", num_unmasked=number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_target_outside_the_vocabulary_is_nan_and_passes_no_gradient() -> None:
    hidden = torch.randn(2, 16, device="cuda", requires_grad=True)
    stats = token_stats(hidden, torch.randn(50, 16, device="cuda"), torch.tensor([50, 3], device="cuda"))
    assert stats.logprob is not None
    assert stats.logprob[0].isnan() and stats.logprob[1].isfinite()


def test_the_workspace_bounds_the_memory() -> None:
    count, dim, vocabulary, workspace = 2048, 512, 50000, 64 << 20
    hidden = torch.randn(count, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (count,), device="cuda")
    token_stats(hidden[:8], weight, targets[:8], memory="recompute")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stats = token_stats(hidden, weight, targets, memory="recompute", workspace_bytes=workspace)
    assert stats.logprob is not None and stats.entropy is not None
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    torch.cuda.synchronize()
    beyond = torch.cuda.max_memory_allocated() - before - 2 * (hidden.numel() + weight.numel())
    # the workspace, the fp32 sums of one slice and of the hidden states, and cuBLAS's own
    assert beyond < 2 * workspace + 8 * hidden.numel() + (48 << 20)


@pytest.mark.parametrize("count", [1, 2047, 2048, 2049, 20000])
def test_the_advantage_scan_is_the_loop(count: int) -> None:
    rewards, values = torch.randn(2, count)
    sequence = torch.randint(40, (count,)).sort().values
    mask = torch.rand(count) < 0.7
    truth = gae(rewards.double(), values.double(), sequence, mask, gamma=0.99, backend="reference")
    got = gae(rewards.cuda(), values.cuda(), sequence.cuda(), mask.cuda(), gamma=0.99, backend="triton")
    assert_close(
        {"advantages": got.advantages.cpu(), "returns": got.returns.cpu()}, truth._asdict(), relative=1e-5
    )


@pytest.mark.slow
def test_more_than_two_billion_logits_are_addressed() -> None:
    count, vocabulary = 32768, 151936
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    hidden = torch.randn(count, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, 64, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocabulary, (count,), device="cuda")
    whole = token_stats(hidden, weight, targets, memory="keep")
    last = token_stats(hidden[-64:], weight, targets[-64:])
    assert whole.logprob is not None and last.logprob is not None
    torch.testing.assert_close(whole.logprob[-64:], last.logprob, rtol=1e-4, atol=1e-4)
