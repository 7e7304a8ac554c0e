"""Log-probs among candidates: gathered rows of the head against a log-softmax over all, masked logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf.kernels.candidate_logprob import candidate_logprob, candidate_logprob_reference
from rlhf.kernels.token_stats import token_stats
from rlhf.tensors.candidates import Candidates


def problem(seed: int, sizes: list[int], vocabulary: int = 30, dim: int = 5, bias: bool = True) -> Any:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n, dim, generator=generator) for n in (len(sizes), vocabulary)]
    tensors += [torch.randn(vocabulary, generator=generator)] if bias else []
    candidates = Candidates.of(
        [torch.randperm(vocabulary, generator=generator)[:size].tolist() for size in sizes]
    )
    return [t.double().requires_grad_() for t in tensors], candidates


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=9),
    temperature=st.floats(0.2, 3.0),
    softcap=st.sampled_from([None, 2.0]),
    bias=st.booleans(),
)
@example(seed=0, sizes=[0], temperature=1.0, softcap=None, bias=True)
def test_values_and_gradients_are_those_of_masked_logits(
    seed: int, sizes: list[int], temperature: float, softcap: float | None, bias: bool
) -> None:
    tensors, candidates = problem(seed, sizes, bias=bias)
    upstream = torch.randn(len(sizes), generator=torch.Generator().manual_seed(seed)).double()
    scaling: Any = {"temperature": temperature, "softcap": softcap, "logit_scale": 0.7}
    found: list[list[torch.Tensor]] = []
    functions: list[tuple[Any, Any]] = [
        (candidate_logprob, {"workspace_bytes": 200}),
        (candidate_logprob_reference, {}),
    ]
    for function, more in functions:
        inputs = [t.detach().clone().requires_grad_() for t in tensors]
        settings_: Any = {**scaling, **more, "bias": inputs[2] if bias else None}
        logprobs = function(*inputs[:2], candidates.ids, candidates.sizes, **settings_)
        logprobs.backward(upstream)
        found.append([logprobs.detach(), *(torch.as_tensor(t.grad) for t in inputs)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-9)


def test_the_only_token_left_is_certain_and_teaches_nothing() -> None:
    tensors, candidates = problem(0, [1, 1])
    logprobs = candidate_logprob(tensors[0], tensors[1], candidates.ids, candidates.sizes, bias=tensors[2])
    assert logprobs.tolist() == [0.0, 0.0]
    logprobs.sum().backward()
    assert not any(bool(tensor.grad.any()) for tensor in tensors)


def test_of_two_tokens_by_hand() -> None:
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[9.0], [1.0], [3.0]])
    logprob = candidate_logprob(hidden, weight, torch.tensor([1, 2]), torch.tensor([2]), temperature=2.0)
    # scores 0.5 and 1.5: the large one of token 0 has no part in it
    assert logprob.item() == pytest.approx(-math.log1p(math.e))


def test_with_everything_kept_it_is_the_log_prob_of_the_whole_vocabulary() -> None:
    tensors, candidates = problem(1, [30, 30, 30])
    hidden, weight, bias = tensors
    targets = candidates.ids[::30]
    expected = token_stats(hidden, weight, targets, bias=bias, temperature=0.6).logprob
    got = candidate_logprob(hidden, weight, candidates.ids, candidates.sizes, bias=bias, temperature=0.6)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_in_full_precision(dtype: torch.dtype) -> None:
    tensors, candidates = problem(2, [7, 0, 30, 2] * 8, dim=64)
    low = [t.detach().to(dtype).requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in low]
    got = candidate_logprob(low[0], low[1], candidates.ids, candidates.sizes, bias=low[2])
    expected = candidate_logprob_reference(
        exact[0], exact[1], candidates.ids, candidates.sizes, bias=exact[2]
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-5)
    got.sum().backward()
    expected.sum().backward()
    for a, b in zip(low, exact, strict=True):
        # rounded once, at the end
        torch.testing.assert_close(a.grad, b.grad.to(dtype), atol=1e-5, rtol=2 * torch.finfo(dtype).eps)


def test_shapes_that_do_not_fit_are_told() -> None:
    tensors, candidates = problem(3, [4, 2])
    with pytest.raises(ValueError, match=r"expected hidden \[N, H\]"):
        candidate_logprob(tensors[0], tensors[1][:, :3], candidates.ids, candidates.sizes)
