"""`logit_stats`: the same numbers as `token_stats`, and masked rows are neither read nor given a gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.kernels.backend import Backend
from rlhf.kernels.token_stats import IGNORED, logit_stats
from tests.kernels.cases import Case, assert_close, make_case, measured, measured_from_logits

pytestmark = pytest.mark.usefixtures("small_tiles")
each_backend = pytest.mark.parametrize("backend", ["reference", "tiled"])


def of_logits(case: Case) -> tuple[Case, Case]:
    """The case with its logits in place of hidden states, and with the identity as its head."""
    logits = case.hidden @ case.weight.T
    ref_logits = None
    if case.ref_hidden is not None:
        assert case.ref_weight is not None
        ref_logits = case.ref_hidden @ case.ref_weight.T
    head = torch.eye(logits.shape[1], dtype=logits.dtype)
    ref_head = None if ref_logits is None else head
    plain = replace(case, hidden=logits, ref_hidden=ref_logits, bias=None, ref_bias=None)
    return plain, replace(plain, weight=head, ref_weight=ref_head)


@each_backend
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([1, 4, 7]),
    vocabulary=st.sampled_from([1, 16, 33]),
    softcap=st.sampled_from([None, 3.0]),
    vector=st.booleans(),
    reference=st.booleans(),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_they_are_the_statistics_of_a_head_that_is_the_identity(
    backend: Backend,
    seed: int,
    tokens: int,
    vocabulary: int,
    softcap: float | None,
    vector: bool,
    reference: bool,
    masked: float,
) -> None:
    plain, with_head = of_logits(
        make_case(
            tokens,
            5,
            vocabulary,
            seed=seed,
            softcap=softcap,
            vector_temperature=vector,
            reference=reference,
            masked=masked,
            logit_scale=0.7,
        )
    )
    got = measured_from_logits(plain, backend=backend)
    truth = measured(with_head, backend="reference")
    truth["d_logits"] = truth.pop("d_hidden")
    truth.pop("d_weight")
    assert_close(got, truth, relative=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_get_fp32_statistics(dtype: torch.dtype) -> None:
    plain, _ = of_logits(make_case(5, 6, 40, dtype=dtype))
    got, truth = (measured_from_logits(plain, backend=b) for b in ("tiled", "reference"))
    assert got["logprob"].dtype is torch.float32
    assert got["d_logits"].dtype is dtype
    step = torch.finfo(dtype).eps
    assert_close(got, {k: v.double() for k, v in truth.items()}, relative=max(step, 1e-6))


@each_backend
def test_a_masked_row_is_never_read(backend: Backend) -> None:
    logits = torch.randn(3, 40)
    logits[1] = torch.nan
    targets = torch.tensor([3, IGNORED, 5])
    case = Case(logits, torch.empty(0), targets, want=("logprob",), upstream={"logprob": torch.ones(3)})
    got = measured_from_logits(case, backend=backend)
    assert got["logprob"][1] == 0
    assert (got["d_logits"][1] == 0).all()
    assert all(value.isfinite().all() for value in got.values())


@each_backend
def test_a_logit_of_minus_infinity_is_never_chosen(backend: Backend) -> None:
    logits = torch.randn(2, 40)
    logits[:, 5:30] = -torch.inf
    case = Case(
        logits,
        torch.empty(0),
        torch.tensor([3, 35]),
        ref_hidden=logits.roll(1, 0),
        want=("logprob", "entropy", "kl", "kl_reverse"),
        upstream={"entropy": torch.ones(2), "kl": torch.ones(2)},
    )
    got = measured_from_logits(case, backend=backend)
    short = torch.cat([logits[:, :5], logits[:, 30:]], 1)
    truth = replace(case, hidden=short, ref_hidden=short.roll(1, 0), targets=torch.tensor([3, 10]))
    expected = measured_from_logits(truth, backend=backend)
    for name in case.want:
        torch.testing.assert_close(got[name], expected[name])
    assert (got["d_logits"][:, 5:30] == 0).all()


def test_an_impossible_call_says_why() -> None:
    logits, targets = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"expected floating-point logits \[N, V\]"):
        logit_stats(torch.zeros(2, 2, 5), targets)
    with pytest.raises(ValueError, match=r"expected integer targets \[2\]"):
        logit_stats(logits, targets[:1])
    with pytest.raises(ValueError, match="expected ref_logits like logits"):
        logit_stats(logits, targets, ref_logits=logits.double(), want=("kl",))
    with pytest.raises(ValueError, match=r"target 5 is outside \[0, 5\)"):
        logit_stats(logits, targets + 5)
