from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf.algos.algorithm import Mismatch
from rlhf.algos.ratio import CORRECTIONS, mismatch_k3, sequence_ratio, token_ratio

LOG_RHO = torch.tensor([0.5, 1.2, -0.3], dtype=torch.float64)
ALL = torch.ones(3, dtype=torch.bool)
ONE = torch.zeros(3, dtype=torch.long)


def weight(kind: str, low: float | None = None, high: float | None = None) -> Tensor:
    return Mismatch(kind, low, high).weight(LOG_RHO, ALL, ONE)  # type: ignore[arg-type]


def test_the_sequence_ratio_is_the_exponential_of_the_mean():
    logprobs = torch.tensor([0.01, -0.02, 0.04], dtype=torch.float64, requires_grad=True)
    ratio = sequence_ratio(logprobs, torch.zeros(3, dtype=torch.float64), ALL, ONE)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.0100502), rtol=0, atol=1e-7)
    # a mean over the sequence of -A s_i has the gradient -s_i A / |o| in each log-probability
    (-0.7 * ratio / 3).sum().backward()
    torch.testing.assert_close(
        logprobs.grad, torch.full((3,), -1.0100502 * 0.7 / 3, dtype=torch.float64), rtol=0, atol=1e-7
    )


def test_the_sequence_ratio_neither_sees_masked_tokens_nor_other_sequences():
    old = torch.zeros(6, dtype=torch.float64)
    logprobs = torch.tensor([0.01, -0.02, 0.04, 9.0, 0.3, 0.1], dtype=torch.float64)
    mask = torch.tensor([1, 1, 1, 0, 1, 1], dtype=torch.bool)
    ratio = sequence_ratio(logprobs, old, mask, torch.tensor([0, 0, 0, 0, 1, 1]))
    assert ratio[0].item() == pytest.approx(1.0100502)
    assert ratio[4].item() == pytest.approx(torch.tensor(0.2).exp().item())


def test_ratios_do_not_overflow():
    far = torch.full((3,), 1e4)
    assert token_ratio(far, torch.zeros(3), ALL, ONE).isfinite().all()
    assert sequence_ratio(far, torch.zeros(3), ALL, ONE).isfinite().all()
    for kind in CORRECTIONS:
        assert Mismatch(kind).weight(far, ALL, ONE).isfinite().all()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "bounds", "expected"),
    [
        ("none", (), [1.0, 1.0, 1.0]),
        ("token_tis", (None, 2.0), [1.648721, 2.0, 0.740818]),
        ("sequence_tis", (None, 2.0), [2.0, 2.0, 2.0]),
        ("sequence_tis", (None, 10.0), [4.0552] * 3),
        ("icepop", (0.5, 2.0), [1.648721, 0.0, 0.740818]),
        ("sequence_mask", (0.5, 2.0), [0.0] * 3),
        ("sequence_mask", (0.5, 4.1), [1.0] * 3),
        ("geometric", (1.59, 1.60), [1.0] * 3),
        ("geometric", (), [0.0] * 3),
        ("k2", (), [1.0] * 3),
        ("k2", (0.0, 0.29), [0.0] * 3),
        ("k3", (), [0.0] * 3),
        ("k3", (0.0, 0.5), [1.0] * 3),
    ],
)
def test_corrections_are_the_numbers_worked_out_by_hand(
    kind: str, bounds: tuple[float], expected: list[float]
):
    # product 4.0552, geometric mean 1.594670; mean of d^2/2 0.296667, of exp(d) - 1 - d 0.436552
    torch.testing.assert_close(
        weight(kind, *bounds), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-5
    )


@pytest.mark.parametrize("kind", list(CORRECTIONS))
def test_without_mismatch_every_correction_is_one(kind: str):
    mismatch = Mismatch(kind)  # type: ignore[arg-type]
    assert (mismatch.weight(torch.zeros(3), ALL, ONE) == 1.0).all()


def test_mismatch_k3_is_never_negative():
    assert (mismatch_k3(torch.linspace(-5, 5, 101)) >= 0).all()


def test_bounds_the_wrong_way_round_are_refused():
    with pytest.raises(ValueError, match=r"mismatch.icepop needs 0 <= low <= high, got low 3.0, high 2.0"):
        Mismatch("icepop", low=3.0, high=2.0)
