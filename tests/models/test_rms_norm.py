"""The fused RMSNorm computes the same function, keeps less, and replaces only norms that compute it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rlhf.models.layers.rms_norm import fuse_norms, rms_norm, rms_norm_reference


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = 3 * torch.randn(2, 5, 24), 1 + torch.randn(24)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def test_gradients_are_those_of_finite_differences() -> None:
    x, weight = problem(torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_equal_and_gradients_are_no_further_from_the_truth(dtype: torch.dtype) -> None:
    x, weight = problem(dtype)
    dy = torch.randn(2, 5, 24).to(dtype)

    def gradients(function: Any, wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(wide).requires_grad_() for t in (x, weight)]
        return list(torch.autograd.grad(function(*leaves, 1e-5), leaves, dy.to(wide)))

    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    truth = gradients(rms_norm_reference, torch.float64)
    ours, plain = gradients(rms_norm, dtype), gradients(rms_norm_reference, dtype)
    for t, a, b in zip(truth, ours, plain, strict=True):
        assert (a - t).norm() <= 1.25 * (b - t).norm() + 1e-7 * t.norm()


def test_it_keeps_nothing_but_its_input_and_a_number_a_row() -> None:
    def kept(function: Any) -> int:
        sizes: dict[int, int] = {}

        def note(t: torch.Tensor) -> torch.Tensor:
            sizes[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            function(*problem(torch.bfloat16), 1e-5)
        return sum(sizes.values())

    numbers = 2 * 5 * 24
    assert kept(rms_norm) == 2 * numbers + 2 * 24 + 4 * 2 * 5
    assert kept(rms_norm_reference) > 2 * kept(rms_norm)


def random_weight(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        nn.init.normal_(next(norm.parameters()), 1.0)
    return norm


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_norms_that_are_this_function_use_it(kind: Any) -> None:
    norm = random_weight(kind(24, eps=1e-5))
    x = torch.randn(3, 24)
    before = norm(x)
    assert fuse_norms(nn.Sequential(norm)) == 1
    assert "RmsNorm" in type(norm(x).grad_fn).__name__
    assert torch.equal(norm(x), before)


def test_a_model_without_weights_yet_is_prepared_too() -> None:
    with torch.device("meta"):
        model = nn.Sequential(LlamaRMSNorm(24), GemmaRMSNorm(24))
    assert fuse_norms(model) == 1


@pytest.mark.parametrize("kind", [GemmaRMSNorm, Olmo2RMSNorm])
def test_norms_that_are_another_function_stay_as_they_are(kind: Any) -> None:
    norm = random_weight(kind(24, eps=1e-5))
    assert fuse_norms(nn.Sequential(norm)) == 0
    assert "forward" not in vars(norm)
