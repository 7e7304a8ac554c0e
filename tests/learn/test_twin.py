"""Two adapters that learn together: their gradients, what may go wrong with adapters, and their roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.algos.table import ALGORITHMS
from rlhf.config.model import LoraConfig
from rlhf.learn.learner import Learner
from rlhf.learn.preference.twin import Twin
from rlhf.models.policy import Policy, WithoutAdapter
from rlhf.types import Duel, Experience, Group
from tests.support import learner_of, make_exact, policy_of, random_groups

pytest.importorskip("peft")
Weights = Mapping[str, nn.Parameter]
GROUPS = [0, 1, 2]


def adapted(folder: Path) -> Policy:
    """A policy in float64 with an adapter that changes its outputs."""
    policy = policy_of(folder)
    policy.add_adapter(LoraConfig(rank=4, alpha=8.0), seed=0)
    make_exact(policy.model)
    shift(policy, seed=1)
    return policy


def shift(policy: Policy, *, seed: int) -> None:
    """Gives the adapter that the policy computes with a random B."""
    assert policy.adapter is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in policy.adapter.weights.items():
            if "lora_B" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))


def pairs() -> list[Group]:
    """Three pairs of random tokens; the second completion is better with probability 0.9."""
    return [replace(g, duels=(Duel(1, 0, 0.9),)) for g in random_groups(3, sizes=[2, 2, 2])]


def twins(folder: Path, *, checkpointing: bool = False, **settings: Any) -> tuple[Learner, Experience]:
    """A learner of `ofs_dpo` whose two adapters differ, and three pairs, a microbatch each."""
    policy = adapted(folder)
    if checkpointing:
        policy.checkpoint_activations()
    learner, builder = learner_of(
        policy, ALGORITHMS["ofs_dpo"](**settings), WithoutAdapter(policy), microbatch_tokens=40
    )
    with twin_of(learner).slow():
        shift(policy, seed=2)
    return learner, builder.build(pairs(), kl_coef=0.0)


def twin_of(learner: Learner) -> Twin:
    assert learner.twin is not None
    return learner.twin


def fast_and_slow(learner: Learner) -> tuple[Weights, Weights]:
    """A and B of the two adapters."""
    assert learner.policy.adapter is not None
    return learner.policy.adapter.weights, twin_of(learner).weights


def taken(weights: Weights) -> list[Tensor]:
    """The gradients of an adapter, which are gone afterwards; fails where a weight has none."""
    found = [weight.grad for weight in weights.values() if weight.grad is not None]
    assert len(found) == len(weights)
    for weight in weights.values():
        weight.grad = None
    return found


def both(learner: Learner, experience: Experience) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of the fast and of the slow adapter."""
    learner.accumulate(experience, GROUPS, learner.counts(experience, GROUPS), 0.0)
    fast, slow = fast_and_slow(learner)
    return taken(fast), taken(slow)


def update(learner: Learner, experience: Experience, step: int) -> dict[str, float]:
    """One update of both adapters, and its metrics."""
    metrics = learner.update(experience, step=step, seed=0, kl_coef=0.0)
    return {name: partial.value for name, partial in metrics.items()}


def of_dpo(learner: Learner, experience: Experience, weights: Weights) -> list[Tensor]:
    """The gradients of plain DPO of one adapter, without the other."""
    policy = learner.policy
    assert policy.adapter is not None
    with policy.adapter.holding(weights):
        alone, _ = learner_of(policy, ALGORITHMS["dpo"](), WithoutAdapter(policy), microbatch_tokens=40)
        alone.accumulate(experience, GROUPS, alone.counts(experience, GROUPS), 0.0)
    return taken(weights)


def against(learner: Learner, experience: Experience, weights: Weights, *, flipped: bool) -> Experience:
    """The experience with an adapter as the reference, and perhaps with the labels turned around."""
    policy = learner.policy
    assert policy.adapter is not None and experience.contrasts is not None
    _, builder = learner_of(policy, ALGORITHMS["dpo"](), WithoutAdapter(policy))
    with torch.no_grad(), policy.adapter.holding(weights):
        logprobs = builder.logprobs(policy, experience)
    target = experience.contrasts.target
    contrasts = replace(experience.contrasts, target=1 - target if flipped else target)
    return replace(experience, ref_logprobs=logprobs, contrasts=contrasts)


def assert_near(a: Sequence[Tensor], b: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    assert len(a) == len(b)
    for got, want in zip(a, b, strict=True):
        assert (got - want).abs().max() <= tolerance * want.abs().max()


def test_without_the_chase_they_are_two_runs_of_dpo(tiny_model_dir: Path):
    learner, experience = twins(tiny_model_dir, alpha=0.0)
    found = both(learner, experience)
    for got, weights in zip(found, fast_and_slow(learner), strict=True):
        assert_near(got, of_dpo(learner, experience, weights))
    assert not torch.allclose(found[0][0], found[1][0], rtol=0.1)


def test_the_chase_is_dpo_with_the_other_adapter_as_the_reference(tiny_model_dir: Path):
    learner, experience = twins(tiny_model_dir, alpha=0.3)
    got_fast, got_slow = both(learner, experience)
    fast, slow = fast_and_slow(learner)
    # + .3 l(z_fast - z_slow); and - .3 l(-(z_slow - z_fast)), which is DPO with its labels turned around.
    # log-probs of a reference are float32 in an experience
    chase = of_dpo(learner, against(learner, experience, slow, flipped=False), fast)
    want = [g + 0.3 * c for g, c in zip(of_dpo(learner, experience, fast), chase, strict=True)]
    assert_near(got_fast, want, 1e-5)
    chased = of_dpo(learner, against(learner, experience, fast, flipped=True), slow)
    want = [g - 0.3 * c for g, c in zip(of_dpo(learner, experience, slow), chased, strict=True)]
    assert_near(got_slow, want, 1e-5)


def test_each_loss_has_no_gradient_in_the_other_adapter(tiny_model_dir: Path, monkeypatch: Any):
    learner, experience = twins(tiny_model_dir)
    fast, slow = fast_and_slow(learner)
    seen: list[list[list[Tensor | None]]] = []
    backward = torch.autograd.backward

    def spied(loss: Tensor) -> None:
        backward(loss)
        seen.append(
            [[w.grad if w.grad is None else w.grad.clone() for w in of.values()] for of in (fast, slow)]
        )

    monkeypatch.setattr(torch.autograd, "backward", spied)
    learner.accumulate(experience, [0], learner.counts(experience, [0]), 0.0)
    after_fast, after_slow = seen
    assert after_fast[1] == [None] * len(slow)
    for before, after in zip(after_fast[0], after_slow[0], strict=True):
        assert before is not None and after is not None and torch.equal(before, after)


def test_activations_made_again_in_the_backward_are_those_of_the_right_adapter(tiny_model_dir: Path):
    plain, checkpointed = (both(*twins(tiny_model_dir, checkpointing=c)) for c in (False, True))
    for got, want in zip(checkpointed, plain, strict=True):
        assert_near(got, want)


def test_the_context_is_what_keeps_them_right(tiny_model_dir: Path):
    """With checkpointed activations, a backward after the context has ended is one of the other adapter."""
    learner, experience = twins(tiny_model_dir, checkpointing=True, alpha=0.0)
    _, want = both(learner, experience)
    twin, backward = twin_of(learner), torch.autograd.backward
    losses: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "backward", losses.append)
        learner.accumulate(experience, GROUPS, learner.counts(experience, GROUPS), 0.0)
    backward(losses[1::2])
    assert (taken(twin.weights)[0] - want[0]).abs().max() > 1e-3 * want[0].abs().max()


def test_an_adapter_that_is_exchanged_after_the_forward_keeps_its_gradient(tiny_model_dir: Path):
    """Also where the backward comes after the exchange, if no activations are made again in it."""
    learner, experience = twins(tiny_model_dir, alpha=0.0)
    want = both(learner, experience)
    losses: list[Tensor] = []
    backward = torch.autograd.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "backward", losses.append)
        learner.accumulate(experience, GROUPS, learner.counts(experience, GROUPS), 0.0)
    fast, slow = fast_and_slow(learner)
    backward(losses[1::2])
    assert all(w.grad is None for w in fast.values())
    assert_near(taken(slow), want[1])
    with twin_of(learner).slow():
        backward(losses[::2])
    assert_near(taken(fast), want[0])


def test_peft_itself_drops_the_gradient_without_a_word(tiny_model_dir: Path):
    """Why adapters are exchanged and not switched: `set_adapter` takes the gradient of the one it leaves."""
    import peft

    policy = adapted(tiny_model_dir)
    assert policy.adapter is not None
    weights, wrapped = policy.adapter.weights, policy.adapter.peft
    wrapped.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    policy.layout = "padded"
    loss = wrapped(input_ids=torch.arange(3, 9)[None]).logits.sum()
    wrapped.set_adapter("other")
    loss.backward()
    assert all(weight.grad is None for name, weight in weights.items() if ".default." in name)


def test_each_adapter_has_its_learning_rate_and_they_part_from_the_second_update_on(tiny_model_dir: Path):
    policy = policy_of(tiny_model_dir)
    policy.add_adapter(LoraConfig(rank=4), seed=0)
    learner, builder = learner_of(policy, ALGORITHMS["ofs_dpo"](lr_ratio=0.25), WithoutAdapter(policy))
    fast, slow = fast_and_slow(learner)
    assert fast is not slow and all(torch.equal(fast[name], slow[name]) for name in fast)
    first, second = (update(learner, builder.build(pairs(), kl_coef=0.0), step) for step in range(2))
    assert first["lr"] == 1e-3 and first["twin/slow_lr"] == 0.25e-3
    # both are the reference at first, and equal: the loss of each is ln 2, and neither is ahead
    assert first["pairs/loss"] == first["twin/slow_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert first["twin/gap"] == 0.0 < second["twin/gap"]
    assert second["pairs/loss"] < second["twin/slow_loss"] < 0.693
    # AdamW's first update moves every weight by its learning rate
    name = next(n for n in fast if "lora_B" in n)
    moved = [abs(w[name]).max().item() for w in (fast, slow)]
    assert moved[1] == pytest.approx(0.25 * moved[0], rel=0.5)


def logprobs(learner: Learner, experience: Experience) -> Tensor:
    """Of all tokens, with the adapter that is the policy's."""
    _, builder = learner_of(learner.policy, ALGORITHMS["dpo"](), WithoutAdapter(learner.policy))
    return builder.logprobs(learner.policy, experience)


def test_the_adapter_with_the_lower_loss_becomes_the_fast_one(tiny_model_dir: Path):
    learner, experience = twins(tiny_model_dir, interval=2, lr_ratio=0.25)
    twin = twin_of(learner)
    if update(learner, experience, 0)["twin/slow_loss"] > update(learner, experience, 1)["pairs/loss"]:
        # the one that is ahead begins as the slow one
        twin._swap()
        twin.fast.lr_scale, twin.optimizer.lr_scale = 1.0, 0.25
    twin._new = [0.0, 0.0]
    losses = update(learner, experience, 2)
    assert losses["twin/slow_loss"] < losses["pairs/loss"]
    with twin.slow():
        of_slow = logprobs(learner, experience)
    of_fast, masters = logprobs(learner, experience), (twin.fast.masters, twin.optimizer.masters)
    # in the middle of an interval nothing happens
    assert twin.after(1)["twin/swaps"].value == 0.0
    assert torch.equal(logprobs(learner, experience), of_fast)
    assert twin.after(2)["twin/swaps"].value == 1.0
    assert torch.equal(logprobs(learner, experience), of_slow)
    assert (twin.optimizer.masters, twin.fast.masters) == masters
    assert (twin.fast.lr(0), twin.optimizer.lr(0)) == (0.25e-3, 1e-3)
    # what it learns goes where it computes: the next update moves the policy
    after = update(learner, experience, 3)
    assert (after["lr"], after["twin/slow_lr"]) == (0.25e-3, 1e-3)
    assert not torch.equal(logprobs(learner, experience), of_slow)
    with twin.slow():
        assert not torch.equal(logprobs(learner, experience), of_fast)
    # it stays the fast one as long as it is not behind
    twin._losses, twin._new = [0.5, 0.5], [0.0, 0.0]
    assert twin.after(4)["twin/swaps"].value == 0.0
