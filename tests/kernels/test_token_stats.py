"""`token_stats` against float64 autograd: every statistic, every gradient, and the edges of both."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.kernels.backend import Backend
from rlhf.kernels.token_stats import IGNORED, TokenStats, rows, token_stats
from rlhf.kernels.token_stats.api import Memory
from tests.kernels.cases import (
    DIFFERENTIABLE,
    FIELDS,
    Case,
    assert_close,
    assert_no_worse,
    exact,
    make_case,
    measured,
    plain,
)

BACKENDS = ("reference", "tiled")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
pytestmark = pytest.mark.usefixtures("small_tiles")

cases = st.builds(
    make_case,
    tokens=st.sampled_from([1, 2, 3, 4, 5, 9]),
    dim=st.sampled_from([1, 5, 8]),
    vocabulary=st.sampled_from([1, 2, 15, 16, 17, 31, 64, 97]),
    seed=st.integers(0, 2**31),
    bias=st.booleans(),
    vector_temperature=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    logit_scale=st.sampled_from([1.0, 0.7, -1.5]),
    reference=st.booleans(),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
)


@each_backend
@pytest.mark.parametrize("memory", ["keep", "recompute"])
@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_every_statistic_and_gradient_is_the_one_of_float64_autograd(
    backend: Backend, memory: Memory, case: Case
) -> None:
    assert_close(measured(case, backend=backend, memory=memory), exact(case), relative=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_it_is_no_further_from_the_truth_than_plain_pytorch(
    dtype: torch.dtype, softcap: float | None
) -> None:
    """Compares root mean square errors over many cases, since single numbers of either vary by chance.

    Merging the statistics of many tiny tiles may cost a quarter more error.
    """
    ours: dict[str, float] = defaultdict(float)
    theirs: dict[str, float] = defaultdict(float)
    for seed in range(40):
        case = make_case(
            9, 24, 131, seed=seed, dtype=dtype, softcap=softcap, vector_temperature=seed % 2 == 0
        )
        truth = exact(case)
        for errors, got in ((ours, measured(case, backend="tiled")), (theirs, plain(case))):
            for name, value in truth.items():
                errors[name] += (got[name].double() - value).square().sum().item()
    for name, error in ours.items():
        assert error**0.5 <= 1.25 * theirs[name] ** 0.5, name


@each_backend
@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_a_constant_added_to_all_logits_costs_no_digits(backend: Backend, offset: float) -> None:
    case = make_case(6, 8, 97, dtype=torch.float32, bias=True)
    assert case.bias is not None
    shifted = measured(replace(case, bias=case.bias + offset), backend=backend)
    truth = exact(replace(case, bias=case.bias + offset))
    # a logit near 300 carries an error of 2e-5 itself, before any statistic is taken
    assert_close(shifted, truth, relative=3e-4)
    assert (shifted["entropy"] > 0).all()
    assert (shifted["kl"] > 0).all()


def test_offsets_cost_the_tiled_backend_no_more_than_plain_pytorch() -> None:
    for offset in (-300.0, 300.0):
        case = make_case(6, 8, 97, dtype=torch.float32, bias=True)
        assert case.bias is not None
        case = replace(case, bias=case.bias + offset)
        fast, plain = measured(case, backend="tiled"), measured(case, backend="reference")
        assert_no_worse(fast, plain, exact(case), slack=2e-5)


@pytest.mark.parametrize("margin", [5.0, 10.0, 15.0, 20.0, 25.0])
def test_a_confident_token_keeps_its_small_log_probability(margin: float) -> None:
    weight = torch.zeros(97, 1)
    weight[3] = margin
    stats = token_stats(torch.ones(1, 1), weight, torch.tensor([3]))
    truth = torch.log_softmax(weight[:, 0].double(), 0)
    assert stats.logprob is not None and stats.entropy is not None
    torch.testing.assert_close(stats.logprob.double(), truth[3:4], rtol=1e-5, atol=0.0)
    entropy = -(truth.exp() * truth).sum()[None]
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=0.0)


@each_backend
def test_equal_logits_are_a_uniform_distribution(backend: Backend) -> None:
    stats = token_stats(torch.zeros(2, 4), torch.ones(50, 4), torch.tensor([0, 49]), backend=backend)
    expected = torch.tensor(50.0).log().expand(2)
    torch.testing.assert_close(stats.entropy, expected)
    torch.testing.assert_close(stats.logprob, -expected)


@each_backend
@pytest.mark.parametrize("target", [1, 40, 7])
def test_two_equal_maxima_share_the_probability(backend: Backend, target: int) -> None:
    case = make_case(1, 1, 50, reference=False, bias=True)
    bias = torch.zeros(50, dtype=torch.float64)
    bias[1], bias[40] = 20.0, 20.0
    case = replace(case, bias=bias, targets=torch.tensor([target]))
    assert_close(measured(case, backend=backend), exact(case), relative=1e-12)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_columns_of_minus_infinity_are_never_chosen(backend: Backend, dtype: torch.dtype) -> None:
    case = make_case(4, 5, 40, dtype=dtype, bias=True)
    assert case.bias is not None and case.ref_bias is not None
    bias, ref_bias = case.bias.clone(), case.ref_bias.clone()
    closed = torch.arange(40) % 3 == 1
    closed[:17] = True
    closed[0], closed[39] = False, False
    bias[closed], ref_bias[closed] = -torch.inf, -torch.inf
    targets = torch.tensor([0, 39, 20, 18])
    case = replace(case, bias=bias, ref_bias=ref_bias, targets=targets)
    tolerance = 1e-10 if dtype is torch.float64 else 1e-5
    got = measured(case, backend=backend)
    truth = measured(case.to(torch.float64), backend="reference")
    assert_close(got, truth, relative=tolerance)
    assert (got["d_weight"][closed] == 0).all()
    assert all(value.isfinite().all() for value in got.values())


@each_backend
def test_a_target_of_minus_infinity_has_no_probability(backend: Backend) -> None:
    bias = torch.zeros(20)
    bias[4] = -torch.inf
    stats = token_stats(torch.ones(1, 2), torch.ones(20, 2), torch.tensor([4]), bias=bias, backend=backend)
    assert stats.logprob is not None and stats.logprob.item() == -torch.inf


@each_backend
def test_a_nan_stays_visible(backend: Backend) -> None:
    hidden = torch.ones(2, 3)
    hidden[0, 1] = torch.nan
    stats = token_stats(hidden, torch.randn(40, 3), torch.tensor([0, 1]), backend=backend)
    for value in (stats.logprob, stats.entropy):
        assert value is not None and value[0].isnan() and value[1].isfinite()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_policy_equal_to_its_reference_has_no_divergence(backend: Backend, dtype: torch.dtype) -> None:
    case = make_case(5, 8, 97, dtype=dtype, upstream=("kl", "kl_reverse"), vector_temperature=True)
    case = replace(case, ref_hidden=case.hidden, ref_weight=None, ref_bias=None)
    got = measured(case, backend=backend)
    for name in ("kl", "kl_reverse"):
        torch.testing.assert_close(got[name], torch.zeros_like(got[name]), rtol=0, atol=1e-7)
    for name in ("d_hidden", "d_weight"):
        torch.testing.assert_close(got[name], torch.zeros_like(got[name]), rtol=0, atol=1e-5)
    torch.testing.assert_close(got["ref_logprob"], got["logprob"])


@each_backend
def test_a_shared_head_brings_its_bias(backend: Backend) -> None:
    case = make_case(5, 8, 40, bias=True)
    assert case.ref_hidden is not None
    shared = replace(case, ref_hidden=case.ref_hidden[:, :8], ref_weight=None, ref_bias=None)
    spelled = replace(shared, ref_weight=case.weight, ref_bias=case.bias)
    assert_close(measured(shared, backend=backend), measured(spelled, backend=backend), relative=1e-14)


@each_backend
def test_the_gradient_by_all_logits_of_a_token_adds_up_to_the_one_of_logsumexp(backend: Backend) -> None:
    case = make_case(6, 5, 40, bias=True)
    case = replace(case, temperature=1.0)
    got = measured(case, backend=backend)
    total = case.upstream["logsumexp"].sum()
    torch.testing.assert_close(got["d_bias"].sum(), total)


@each_backend
@pytest.mark.parametrize("name", FIELDS)
def test_each_statistic_can_be_had_alone(backend: Backend, name: str) -> None:
    case = make_case(5, 6, 40, bias=True)
    together = exact(replace(case, upstream={k: v for k, v in case.upstream.items() if k == name}))
    alone = replace(case, want=(name,), upstream={k: v for k, v in case.upstream.items() if k == name})
    got = measured(alone, backend=backend)
    assert_close(got, {k: together[k] for k in got}, relative=1e-10)


@each_backend
@pytest.mark.parametrize("names", list(itertools.combinations(DIFFERENTIABLE, 2)))
def test_any_mix_of_upstream_gradients(backend: Backend, names: tuple[str, ...]) -> None:
    case = make_case(5, 6, 40, upstream=names)
    assert_close(measured(case, backend=backend), exact(case), relative=1e-10)


@each_backend
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_only_the_gradients_asked_for_are_made(backend: Backend, needs: tuple[bool, ...]) -> None:
    case = make_case(5, 6, 40, bias=True)
    assert case.bias is not None
    truth = exact(case)
    inputs = [
        t.clone().requires_grad_(n) for t, n in zip((case.hidden, case.weight, case.bias), needs, strict=True)
    ]
    stats = token_stats(
        inputs[0], inputs[1], case.targets, bias=inputs[2], temperature=0.8, want=FIELDS[:3], backend=backend
    )
    if not any(needs):
        assert not any(s.requires_grad for s in stats if s is not None)
        return
    got = [value for value in stats if value is not None]
    terms = [(case.upstream[k] * v).sum() for k, v in zip(FIELDS[:3], got, strict=True)]
    torch.stack(terms).sum().backward()
    truth = exact(replace(case, upstream={k: case.upstream[k] for k in FIELDS[:3]}))
    for name, tensor, need in zip(("hidden", "weight", "bias"), inputs, needs, strict=True):
        assert (tensor.grad is not None) == need
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, truth[f"d_{name}"], rtol=1e-10, atol=1e-10)


def test_the_reference_gets_no_gradient() -> None:
    case = make_case(3, 4, 20)
    assert case.ref_hidden is not None and case.ref_weight is not None
    for backend in BACKENDS:
        side = [t.clone().requires_grad_() for t in (case.ref_hidden, case.ref_weight)]
        stats = token_stats(
            case.hidden.clone().requires_grad_(),
            case.weight,
            case.targets,
            ref_hidden=side[0],
            ref_weight=side[1],
            want=("kl", "ref_logprob"),
            backend=backend,
        )
        assert stats.kl is not None and stats.ref_logprob is not None
        stats.kl.sum().backward()
        assert all(t.grad is None for t in side)


@each_backend
def test_masked_tokens_are_not_computed(backend: Backend) -> None:
    case = make_case(8, 5, 40, masked=0.5, seed=3)
    masked = case.targets == IGNORED
    assert masked.any() and not masked.all()
    poisoned = case.hidden.clone()
    poisoned[masked] = torch.nan
    got = measured(replace(case, hidden=poisoned), backend=backend)
    assert_close(got, exact(case), relative=1e-10)
    assert (got["d_hidden"][masked] == 0).all()


@each_backend
@pytest.mark.parametrize("tokens", [0, 3])
def test_no_token_to_learn_from_gives_zeros(backend: Backend, tokens: int) -> None:
    case = make_case(tokens, 5, 40, masked=1.0, bias=True)
    for value in measured(case, backend=backend).values():
        assert (value == 0).all()


@each_backend
def test_a_known_number_of_kept_tokens_changes_nothing(backend: Backend) -> None:
    case = make_case(8, 5, 40, masked=0.5, seed=3)
    number = int((case.targets != IGNORED).sum())
    plain, counted = measured(case, backend=backend), measured(case, backend=backend, num_unmasked=number)
    assert all(torch.equal(plain[k], counted[k]) for k in plain)
    with pytest.raises(ValueError, match=f"num_unmasked is 8, but {number}|num_unmasked is 7, but {number}"):
        measured(case, backend=backend, num_unmasked=7)


def test_keeping_the_logits_gives_the_same_bits_as_computing_them_again() -> None:
    case = make_case(9, 24, 131, dtype=torch.float32, bias=True, softcap=5.0)
    kept, again = (measured(case, backend="tiled", memory=m) for m in ("keep", "recompute"))
    assert all(torch.equal(kept[k], again[k]) for k in kept)


def test_permuting_tokens_permutes_the_statistics_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(9, 24, 131, dtype=torch.float32, vector_temperature=True)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert isinstance(case.temperature, torch.Tensor) and case.ref_hidden is not None
    moved = replace(
        case,
        hidden=case.hidden[order],
        targets=case.targets[order],
        temperature=case.temperature[order],
        ref_hidden=case.ref_hidden[order],
    )
    monkeypatch.setattr("rlhf.kernels.token_stats.tile_sizes.CPU_ROWS", 1024)
    first, second = measured(case, backend="tiled"), measured(moved, backend="tiled")
    for name in FIELDS:
        torch.testing.assert_close(first[name][order], second[name], rtol=1e-5, atol=1e-6)


def test_two_runs_give_the_same_bits() -> None:
    case = make_case(9, 24, 131, dtype=torch.bfloat16, bias=True)
    first, second = (measured(case, backend="tiled") for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@each_backend
def test_backward_may_run_twice_over_a_kept_graph(backend: Backend) -> None:
    case = make_case(5, 6, 40)
    hidden = case.hidden.clone().requires_grad_()
    stats = token_stats(hidden, case.weight, case.targets, backend=backend, memory="keep")
    assert stats.logprob is not None
    first, second = (torch.autograd.grad(stats.logprob.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_differentiating_twice_is_an_error() -> None:
    case = make_case(3, 4, 20)
    hidden = case.hidden.clone().requires_grad_()
    stats = token_stats(hidden, case.weight, case.targets, backend="tiled")
    assert stats.logprob is not None
    (gradient,) = torch.autograd.grad(stats.logprob.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@each_backend
def test_hidden_states_may_be_a_view_with_any_strides(backend: Backend) -> None:
    case = make_case(6, 5, 40)
    base = torch.full((12, 11), torch.nan, dtype=torch.float64)
    view = base.T[1:11:2, ::2].T
    view.copy_(case.hidden)
    assert not view.is_contiguous()
    got = token_stats(view, case.weight, case.targets, temperature=0.8, backend=backend)
    torch.testing.assert_close(got.logprob, exact(case)["logprob"])
    columns = case.weight.T.contiguous().T
    got = token_stats(case.hidden, columns, case.targets, temperature=0.8, backend=backend)
    torch.testing.assert_close(got.logprob, exact(case)["logprob"])


@each_backend
def test_autocast_does_not_lower_the_precision(backend: Backend) -> None:
    case = make_case(6, 32, 97, dtype=torch.float32)
    plain = measured(case, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = measured(case, backend=backend)
    # backward of plain PyTorch is itself subject to an autocast around it
    names = FIELDS if backend == "reference" else plain
    assert all(torch.equal(plain[k], inside[k]) for k in names)


def test_statistics_are_fp32_whatever_goes_in() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        case = make_case(3, 4, 20, dtype=dtype)
        got = measured(case, backend="tiled")
        assert {got[k].dtype for k in FIELDS} == {torch.float32}
        assert {got[f"d_{k}"].dtype for k in ("hidden", "weight")} == {dtype}


def test_what_is_not_wanted_is_none() -> None:
    case = make_case(3, 4, 20)
    stats = token_stats(case.hidden, case.weight, case.targets, want=("entropy",))
    assert isinstance(stats, TokenStats)
    assert [name for name in FIELDS if getattr(stats, name) is not None] == ["entropy"]


@pytest.mark.parametrize("size", [1e-7, 1.0, 1e4])
def test_small_upstream_gradients_do_not_vanish_in_fp16(size: float) -> None:
    gradient = size * torch.randn(6)
    upstream = rows.Upstream(gradient, None, None, None, None)
    values = torch.ones(8, 6)
    coefficients, factor = rows.magnified(rows.Coefficients(values, False, False, False), upstream)
    largest = gradient.abs().max() * factor
    assert 8 < largest <= 16
    assert torch.equal(coefficients.values[:2], values[:2])
    assert torch.equal(coefficients.values[2:], values[2:] * factor)
    assert factor.log2() == factor.log2().round()
