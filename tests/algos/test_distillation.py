"""`distill`: exact KLs in both directions by hand, their gradients, and what the algorithm asks for."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.algos.algorithm import KL, LossOutput
from rlhf.algos.table import ALGORITHMS
from rlhf.kernels.token_stats import token_stats
from rlhf.types import Counts, LossInputs

# probabilities of three tokens
TEACHER = (0.25, 0.25, 0.5)
POLICY = (0.5, 0.25, 0.25)
UNEVEN = (0.7, 0.2, 0.1)
# 0.5 ln(0.5 / 0.25) + 0 + 0.25 ln(0.25 / 0.5) = 0.25 ln 2: KL(POLICY || TEACHER)
REVERSE = 0.25 * log(2)


def distill(forward: float = 0.0, **kl: Any):
    return ALGORITHMS["distill"](kl=KL(coef=1.0, estimator="exact", forward=forward, **kl))


def loss_of(
    logits: Tensor, teacher: Tensor, forward: float, *, mask: list[bool] | None = None, tokens: int = 0
) -> LossOutput:
    """The loss of tokens whose models have these logits `[N, 3]`, as the learner computes it."""
    n = len(logits)
    # with an identity for the head the hidden states are the logits
    stats = token_stats(
        logits,
        torch.eye(3, dtype=logits.dtype),
        torch.zeros(n, dtype=torch.long),
        ref_hidden=teacher,
        ref_weight=torch.eye(3, dtype=logits.dtype),
        want=("logprob", "entropy", "kl", "kl_reverse", "ref_logprob"),
    )
    assert stats.logprob is not None and stats.entropy is not None
    here = torch.ones(n, dtype=torch.bool) if mask is None else torch.tensor(mask)
    none = torch.zeros(n, dtype=logits.dtype)
    return distill(forward).loss(
        LossInputs(
            logprobs=stats.logprob,
            entropy=stats.entropy.detach(),
            exact_kl=stats.kl,
            forward_kl=stats.kl_reverse,
            old_logprobs=none,
            rollout_logprobs=none,
            ref_logprobs=stats.ref_logprob,
            advantages=none,
            loss_mask=here,
            sequence=none.long(),
            turn=none.long(),
            counts=Counts(tokens=tokens or int(here.sum()), sequences=1),
            kl_coef=1.0,
        )
    )


def logits_of(*rows: tuple[float, ...]) -> Tensor:
    # a constant added to logits changes nothing
    return torch.tensor(rows, dtype=torch.float64).log() + 3.0


def test_the_loss_is_the_exact_kl_by_hand_in_each_direction_and_between():
    policy, teacher = logits_of(UNEVEN), logits_of(TEACHER)
    # 0.7 ln(0.7 / 0.25) + 0.2 ln(0.2 / 0.25) + 0.1 ln(0.1 / 0.5) = 0.720733 - 0.044629 - 0.160944
    reverse = 0.515161
    # 0.25 ln(0.25 / 0.7) + 0.25 ln(0.25 / 0.2) + 0.5 ln(0.5 / 0.1) = -0.257405 + 0.055786 + 0.804719
    forward = 0.603100
    for share, value in ((0.0, reverse), (1.0, forward), (0.25, 0.75 * reverse + 0.25 * forward)):
        output = loss_of(policy, teacher, share)
        assert output.loss.item() == pytest.approx(value, abs=2e-6)
        assert output.metrics["kl/exact"].value == pytest.approx(reverse, abs=2e-6)
        assert output.metrics["kl/forward"].value == pytest.approx(forward, abs=2e-6)
    assert loss_of(logits_of(POLICY), teacher, 0.0).loss.item() == pytest.approx(REVERSE, abs=1e-12)
    assert loss_of(teacher, teacher, 0.5).loss.item() == pytest.approx(0.0, abs=1e-12)


def test_it_is_a_mean_over_the_tokens_of_the_whole_update():
    policy = logits_of(POLICY, UNEVEN, POLICY)
    teacher = logits_of(TEACHER, TEACHER, TEACHER)
    # a masked token in the middle, and two of the update's five tokens here
    got = loss_of(policy, teacher, 0.0, mask=[True, False, True], tokens=5).loss
    assert got.item() == pytest.approx(2 / 5 * REVERSE, abs=1e-12)


@pytest.mark.parametrize("forward", [0.0, 0.3, 1.0])
def test_the_gradient_is_that_of_finite_differences(forward: float):
    logits = logits_of(POLICY, UNEVEN).requires_grad_()
    teacher = logits_of(TEACHER, POLICY)
    loss_of(logits, teacher, forward).loss.backward()
    assert logits.grad is not None
    step = 1e-6
    for place in range(6):
        moved = torch.zeros(6, dtype=torch.float64)
        moved[place] = step
        up, down = (loss_of(logits.detach() + s * moved.view(2, 3), teacher, forward).loss for s in (1, -1))
        assert logits.grad.flatten()[place].item() == pytest.approx((up - down).item() / (2 * step), abs=1e-9)


def test_the_gradient_of_the_forward_kl_is_the_difference_of_the_probabilities():
    logits = logits_of(UNEVEN).requires_grad_()
    loss_of(logits, logits_of(TEACHER), 1.0).loss.backward()
    assert logits.grad is not None
    # d KL(q || p) / d logit = p - q: 0.7 - 0.25, 0.2 - 0.25, 0.1 - 0.5
    torch.testing.assert_close(logits.grad[0], torch.tensor([0.45, -0.05, -0.4], dtype=torch.float64))


def test_it_asks_for_a_teacher_and_for_no_rewards():
    algorithm = ALGORITHMS["distill"]()
    assert algorithm.needs_reference and algorithm.needs_exact_kl and algorithm.has_teacher
    assert not algorithm.needs_rewards and algorithm.learns_at_zero(1.0)
    for name, settings in (("sft", {}), ("dpo", {}), ("grpo", {"kl": KL(coef=1.0, estimator="exact")})):
        other = ALGORITHMS[name](**settings)
        assert other.needs_rewards and not other.has_teacher


@pytest.mark.parametrize(
    ("kl", "message"),
    [
        ({"coef": 0.0}, "needs kl.coef above 0 and kl.placement loss, got 0 and loss"),
        ({"coef": 1.0, "estimator": "k1", "placement": "reward"}, "got 1 and reward"),
        ({"coef": 1.0, "estimator": "exact", "forward": 1.5}, "kl.forward must be from 0 to 1, got 1.5"),
        ({"coef": 1.0, "estimator": "k3", "forward": 0.5}, "kl.forward needs kl.estimator exact, got k3"),
    ],
)
def test_a_kl_that_cannot_teach_is_refused(kl: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ALGORITHMS["distill"](kl=KL(**kl))
