"""What must hold for every algorithm, in float64: `Algorithm.loss` on packed sequences of random lengths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.algos.algorithm import KL, Algorithm, LossOutput, Mismatch
from rlhf.algos.reduction import Where
from rlhf.algos.table import ALGORITHMS
from rlhf.metrics import merge
from rlhf.types import Counts, LossInputs

REQUIRED: dict[str, dict[str, Any]] = {
    "dr_grpo": {"max_tokens": 16},
    "dapo": {"max_tokens": 16},
    "cispo": {"max_tokens": 16, "clip_high": 0.28},
    "dtpo": {"tool_objectives": ("tool",)},
}
TENSORS = (
    "logprobs",
    "entropy",
    "exact_kl",
    "old_logprobs",
    "rollout_logprobs",
    "ref_logprobs",
    "advantages",
    "loss_mask",
    "turn",
    "correct",
)
# the laws of methods that learn from no advantages are in tests/algos/preference and test_distillation.py
every_algorithm = pytest.mark.parametrize(
    "name",
    [
        name
        for name, make in ALGORITHMS.items()
        if name != "distill" and not make(**REQUIRED.get(name, {})).preference
    ],
)
lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def make(name: str, **settings: Any) -> Algorithm:
    return ALGORITHMS[name](**REQUIRED.get(name, {}), **settings)


def pack(rows: list[dict[str, Tensor]], counts: Counts, kl_coef: float) -> LossInputs:
    """Sequences end to end, numbered anew, as a microbatch."""
    fields: dict[str, Any] = {key: torch.cat([row[key] for row in rows]) for key in TENSORS}
    sizes = torch.tensor([len(row["turn"]) for row in rows])
    return LossInputs(
        **fields, sequence=torch.arange(len(rows)).repeat_interleave(sizes), counts=counts, kl_coef=kl_coef
    )


def random_rows(lengths: list[int], seed: int) -> tuple[list[dict[str, Tensor]], Counts]:
    """Sequences some way off policy, about a quarter of the tokens masked, and the counts of all together."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Tensor]] = []
    for length in lengths:
        noise = torch.randn(6, length, generator=generator, dtype=torch.float64)
        old = -noise[0].abs() - 0.1
        rows.append(
            {
                "logprobs": (old + 0.3 * noise[1]).requires_grad_(),
                "entropy": noise[2].abs().requires_grad_(),
                "exact_kl": noise[3].abs().requires_grad_(),
                "old_logprobs": old,
                "rollout_logprobs": old + 0.3 * noise[4],
                "ref_logprobs": old + 0.5 * noise[5],
                "advantages": torch.full_like(old, noise[0, 0].item()),
                "loss_mask": torch.rand(length, generator=generator) < 0.75,
                "turn": torch.zeros(length, dtype=torch.long),
                "correct": torch.zeros(length, dtype=torch.bool),
            }
        )
    masks = [row["loss_mask"] for row in rows]
    return rows, Counts(tokens=sum(int(m.sum()) for m in masks), sequences=sum(int(m.any()) for m in masks))


def gradients(loss: Tensor, rows: list[dict[str, Tensor]]) -> Tensor:
    """The gradient by every log-probability and entropy, sequence by sequence."""
    inputs = [row[key] for row in rows for key in ("logprobs", "entropy", "exact_kl")]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return torch.cat([torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)])


def with_all_terms(name: str, estimator: str = "k3") -> Algorithm:
    return make(name, kl=KL(coef=0.1, estimator=estimator), entropy_coef=0.01)  # type: ignore[arg-type]


@every_algorithm
@settings(max_examples=25)
@given(lengths=lengths, seed=st.integers(0, 10_000), cut=st.integers(0, 5), data=st.data())
def test_neither_the_cut_into_microbatches_nor_the_order_of_sequences_changes_anything(
    name: str, lengths: list[int], seed: int, cut: int, data: st.DataObject
):
    algorithm = with_all_terms(name, data.draw(st.sampled_from(["k2", "k3", "exact"])))
    rows, counts = random_rows(lengths, seed)
    rows = [row | {"correct": torch.full_like(row["correct"], i % 2 == 0)} for i, row in enumerate(rows)]
    correct = sum(int((row["correct"] & row["loss_mask"]).sum()) for row in rows)
    counts = replace(counts, correct_tokens=correct)
    whole = algorithm.loss(pack(rows, counts, 0.1))
    shuffled = data.draw(st.permutations(rows))
    parts = [part for part in (shuffled[:cut], shuffled[cut:]) if part]
    outputs = [algorithm.loss(pack(part, counts, 0.1)) for part in parts]
    loss = torch.stack([output.loss for output in outputs]).sum()
    torch.testing.assert_close(loss, whole.loss, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients(loss, rows), gradients(whole.loss, rows), rtol=0, atol=1e-10)
    merged = merge(output.metrics for output in outputs)
    assert merged.keys() == whole.metrics.keys()
    for key, partial in whole.metrics.items():
        assert merged[key].value == pytest.approx(partial.value, abs=1e-9, nan_ok=True), key


def on_policy(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [
        row | {key: row["logprobs"].detach() for key in ("old_logprobs", "rollout_logprobs", "ref_logprobs")}
        for row in rows
    ]


@every_algorithm
@given(lengths=lengths, seed=st.integers(0, 10_000))
@settings(max_examples=25)
def test_on_policy_the_gradient_is_minus_the_advantage_reduced(name: str, lengths: list[int], seed: int):
    rows, counts = random_rows(lengths, seed)
    algorithm = make(name, kl=KL())
    batch = pack(on_policy(rows), counts, 0.0)
    # GOLD's weight stands for a ratio to data whose own probabilities nobody knows: it is never 1
    weight = batch.logprobs.detach().exp().clamp(min=0.1) if name == "r_gold" else 1.0
    where = Where(batch.loss_mask, batch.sequence, batch.turn, counts)
    plain = algorithm.reduction(-weight * batch.advantages * batch.logprobs, where)
    got = gradients(algorithm.loss(batch).loss, rows)
    torch.testing.assert_close(got, gradients(plain, rows), rtol=0, atol=1e-12)


@every_algorithm
@given(lengths=lengths, seed=st.integers(0, 10_000))
@settings(max_examples=15)
def test_without_advantages_the_policy_has_no_gradient(name: str, lengths: list[int], seed: int):
    rows, counts = random_rows(lengths, seed)
    rows = [row | {"advantages": torch.zeros_like(row["advantages"])} for row in rows]
    got = gradients(make(name, kl=KL()).loss(pack(rows, counts, 0.0)).loss, rows)
    assert (got == 0.0).all()


def poisoned(batch: LossInputs, value: float) -> LossInputs:
    """The same, with `value` in every field of every token outside the mask."""
    keys = [key for key in TENSORS if key not in ("loss_mask", "turn")]
    return replace(batch, **{key: getattr(batch, key).masked_fill(~batch.loss_mask, value) for key in keys})


@every_algorithm
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_what_stands_outside_the_mask_reaches_neither_loss_nor_gradient_nor_metrics(name: str, value: float):
    rows, counts = random_rows([5, 3, 4], seed=3)
    assert counts.tokens < 12
    algorithm = with_all_terms(name)

    def run(batch: LossInputs) -> tuple[LossOutput, Tensor]:
        output = algorithm.loss(batch)
        return output, gradients(output.loss, rows)

    clean, clean_gradient = run(pack(rows, counts, 0.1))
    got, gradient = run(poisoned(pack(rows, counts, 0.1), value))
    assert torch.equal(got.loss, clean.loss)
    assert torch.equal(gradient, clean_gradient)
    assert got.metrics == clean.metrics


@every_algorithm
def test_a_sequence_that_is_all_masked_contributes_nothing(name: str):
    rows, counts = random_rows([4, 3], seed=1)
    silent = {key: value.clone() for key, value in rows[0].items()}
    silent["loss_mask"] = torch.zeros(4, dtype=torch.bool)
    algorithm = with_all_terms(name)
    alone = algorithm.loss(pack([silent], counts, 0.1))
    assert alone.loss.item() == 0.0
    both = algorithm.loss(pack([*rows, silent], counts, 0.1))
    # another length of the sums is another order of adding
    assert both.loss.item() == pytest.approx(algorithm.loss(pack(rows, counts, 0.1)).loss.item(), rel=1e-12)


@every_algorithm
def test_metrics_are_partial_sums_over_the_masked_tokens(name: str):
    rows, counts = random_rows([5, 3, 4], seed=2)
    metrics = with_all_terms(name).loss(pack(rows, counts, 0.1)).metrics
    batch = pack(rows, counts, 0.1)
    mask = batch.loss_mask
    assert metrics["entropy"].value == pytest.approx(batch.entropy[mask].mean().item())
    assert metrics["kl/old"].value == pytest.approx((batch.old_logprobs - batch.logprobs)[mask].mean().item())
    assert batch.ref_logprobs is not None
    d = (batch.logprobs - batch.ref_logprobs)[mask]
    assert metrics["kl/ref"].value == pytest.approx(((-d).exp() - 1 + d).clamp(max=10).mean().item())
    gap = (batch.old_logprobs - batch.rollout_logprobs)[mask]
    assert metrics["mismatch/k3"].value == pytest.approx((gap.exp() - 1 - gap).mean().item())
    assert metrics["mismatch/ratio_max"].value == pytest.approx(gap.exp().max().item())
    assert metrics["mismatch/masked_fraction"].value == 0.0


def test_the_mismatch_weight_multiplies_the_surrogate_and_nothing_else():
    rows, counts = random_rows([4, 4], seed=5)
    rows = [row | {"rollout_logprobs": row["old_logprobs"] + 50.0} for row in rows]
    dropped = Mismatch("icepop")
    only_kl = make("grpo", kl=KL(coef=0.1), mismatch=dropped).loss(pack(rows, counts, 0.1))
    batch = pack(rows, counts, 0.1)
    assert batch.ref_logprobs is not None
    d = batch.ref_logprobs - batch.logprobs
    where = Where(batch.loss_mask, batch.sequence, batch.turn, counts)
    kl = make("grpo").reduction(0.1 * (d.exp() - 1 - d), where)
    torch.testing.assert_close(only_kl.loss, kl)
    assert only_kl.metrics["mismatch/masked_fraction"].value == 1.0


def test_the_mismatch_weight_has_an_effect_and_no_gradient():
    rows, counts = random_rows([4, 4], seed=5)
    rows = [row | {"rollout_logprobs": row["old_logprobs"] - 0.5} for row in rows]
    with_weight = gradients(make("grpo", kl=KL()).loss(pack(rows, counts, 0.0)).loss, rows)
    without = gradients(
        make("grpo", kl=KL(), mismatch=Mismatch("none")).loss(pack(rows, counts, 0.0)).loss, rows
    )
    torch.testing.assert_close(with_weight, without * torch.tensor(0.5, dtype=torch.float64).exp())


def test_the_coefficient_in_force_is_that_of_the_batch():
    rows, counts = random_rows([4, 4], seed=6)
    algorithm = make("grpo", kl=KL(coef=0.1))
    losses = [algorithm.loss(pack(rows, counts, coef)).loss.item() for coef in (0.0, 0.1, 0.2)]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0])
    assert losses[1] != losses[0]


def test_a_kl_in_the_reward_is_not_in_the_loss():
    rows, counts = random_rows([4, 4], seed=7)
    in_reward = make("rloo", kl=KL(coef=0.5, estimator="k1", placement="reward"))
    without = make("rloo", kl=KL())
    assert torch.equal(
        in_reward.loss(pack(rows, counts, 0.5)).loss, without.loss(pack(rows, counts, 0.0)).loss
    )
    old, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.2, -1.5, -0.5])
    torch.testing.assert_close(in_reward.token_penalty(old, ref, 0.05), torch.tensor([0.01, -0.025, 0.0]))


def test_a_rewarded_entropy_lowers_the_loss():
    rows, counts = random_rows([4, 4], seed=8)
    plain = make("grpo", kl=KL()).loss(pack(rows, counts, 0.0)).loss
    rewarded = make("grpo", kl=KL(), entropy_coef=0.1).loss(pack(rows, counts, 0.0)).loss
    assert rewarded < plain


def test_the_weight_of_a_sequence_does_not_depend_on_the_token_ratio_of_another():
    rows, counts = random_rows([4, 4], seed=9)
    algorithm = make("gspo", clip_low=10.0, clip_high=10.0)
    first = torch.autograd.grad(algorithm.loss(pack(rows, counts, 0.0)).loss, rows[0]["logprobs"])[0]
    moved = [rows[0], rows[1] | {"logprobs": rows[1]["logprobs"] + 1.0}]
    again = torch.autograd.grad(algorithm.loss(pack(moved, counts, 0.0)).loss, rows[0]["logprobs"])[0]
    torch.testing.assert_close(first, again)


def test_a_reference_is_needed_only_with_a_coefficient():
    assert make("grpo").needs_reference
    assert not make("dapo").needs_reference
    assert not make("grpo").needs_exact_kl
    assert make("grpo", kl=KL(coef=0.1, estimator="exact")).needs_exact_kl
    assert make("rloo").needs_reference


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coef": -1.0}, "kl.coef must be 0 or more, got -1.0"),
        ({"target": 0.1}, "kl.target needs target > 0 and a start kl.coef > 0, got 0.1, 0.0"),
        ({"coef": 0.1, "horizon": 0}, "kl.horizon must be 1 or more, got 0"),
        ({"coef": 0.1, "estimator": "k1"}, "k1 in the loss has no expected gradient; use k2 or k3"),
        ({"coef": 0.1, "estimator": "exact", "placement": "reward"}, "exact belongs in the loss"),
    ],
)
def test_a_kl_that_cannot_work_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        KL(**settings)


def test_the_controller_is_there_only_with_a_target():
    assert KL(coef=0.1).controller is None
    controller = KL(coef=0.1, target=0.2, horizon=5).controller
    assert controller is not None
    assert (controller.coef, controller.target, controller.horizon) == (0.1, 0.2, 5)
