"""A float32 master in two halves: what is stored is what was given, and AdamW makes what torch's makes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rlhf.config.learner import LearnerConfig
from rlhf.learn import master_weights as master
from rlhf.learn.master_weights import Master, joined, split
from tests.support import bytes_held

HALFWAY = 0x8000


def bits(value: Tensor) -> Tensor:
    return value.view(torch.int32)


def halves(value: Tensor) -> tuple[Tensor, Tensor]:
    weight, lower = torch.empty_like(value, dtype=torch.bfloat16), torch.empty_like(value, dtype=torch.int16)
    split(value, weight, lower)
    return weight, lower


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_two_halves_are_the_master_again(values: list[float]) -> None:
    value = torch.tensor(values, dtype=torch.float32)
    weight, lower = halves(value)
    halfway = bits(value) & 0xFFFF == HALFWAY
    kept = joined(weight, lower)
    assert torch.equal(bits(kept), bits(value) - halfway.int())
    assert torch.equal(weight.view(torch.int16), kept.bfloat16().view(torch.int16))


@pytest.mark.parametrize("upper", [0x3F80, 0x3F81, 0xBF80 - 0x10000, 0xBF81 - 0x10000, 0])
def test_halfway_between_two_numbers_the_last_bit_goes(upper: int) -> None:
    """One, the number after it, their negatives, and zero; both neighbours of the middle stay as they are."""
    around = torch.tensor([HALFWAY - 1, HALFWAY, HALFWAY + 1]) + upper * 0x10000
    weight, lower = halves(around.int().view(torch.float32))
    assert (bits(joined(weight, lower)) - upper * 0x10000).tolist() == [HALFWAY - 1, HALFWAY - 1, HALFWAY + 1]


@pytest.mark.parametrize("size", [1 << 17, 999])
def test_updates_are_those_of_torch_in_pieces_of_any_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(master, "ON_CPU", size)
    section = LearnerConfig.model_validate({"lr": 1e-3, "weight_decay": 0.1})
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(70, 100, generator=generator)
    ours = Master(nn.Parameter(start.clone()), torch.bfloat16)
    theirs = nn.Parameter(start.clone())
    options = {"betas": section.betas, "eps": section.eps, "weight_decay": section.weight_decay}
    adamw = torch.optim.AdamW([theirs], lr=section.lr, fused=True, **options)
    assert bytes_held(ours) == 4 * start.numel()
    for _ in range(10):
        gradient = torch.randn(start.shape, generator=generator)
        ours.gradient, theirs.grad = gradient.clone(), gradient.clone()
        ours.update(torch.tensor(1.0), section.lr, section)
        adamw.step()
    # a master was halfway between two numbers of bfloat16 now and then
    apart = (bits(ours.value()) - bits(theirs.detach())).abs()
    assert apart.max() <= 2 and (apart > 0).float().mean() < 10 / 2**14
    assert torch.equal(ours.weight, ours.value().bfloat16())
    assert ours.moments.step == 10
    assert torch.equal(ours.moments.first, adamw.state[theirs]["exp_avg"])


def test_no_gradient_is_one_of_zeros() -> None:
    one = Master(nn.Parameter(torch.ones(3)), torch.bfloat16)
    one.collect()
    assert one.norm() == 0 and one.norm().dtype == torch.float32
    assert torch.equal(one.widened(), torch.zeros(3))
