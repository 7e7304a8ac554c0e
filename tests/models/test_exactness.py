"""A group packed with its prompt once trains exactly like its sequences alone, or padded.

In float64: the same log-probs, loss and gradients to 1e-10. In float32: no further from the float64 truth
than the padded form is.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlhf.algos.algorithm import KL
from rlhf.algos.table import ALGORITHMS
from rlhf.metrics import merge
from rlhf.models.packing import Packed, pack
from rlhf.models.policy import Policy
from rlhf.types import Group, Prompt, Trajectory
from tests.support import learner_of, policy_of, trajectory

Folder = Callable[[str], Path]
SHAPES = ["llama", "llama-tied", "qwen2", "qwen2-untied", "qwen3", "gemma"]


def problem(seed: int) -> list[Group]:
    """Groups of 1 to 5, prompts of 1 to 30 tokens, completions of one to three turns, a tool between them."""
    rng = random.Random(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 99) for _ in range(n))

    def sample() -> Trajectory:
        mask: list[bool] = []
        turns: list[int] = []
        for turn in range(rng.randint(1, 3)):
            chosen, tool = rng.randint(1, 5), rng.randint(0, 4)
            mask += [True] * chosen + [False] * tool
            turns += [turn] * (chosen + tool)
        reward = rng.choice([0.0, 1.0, 2.0])
        return trajectory(list(tokens(len(mask))), reward, turns=tuple(turns), loss_mask=tuple(mask))

    lengths = [1, rng.randint(2, 7), rng.randint(8, 30), 21]
    sizes = [rng.randint(2, 5), 5, rng.randint(2, 4), 1]
    prompts = [Prompt(f"p{i}", tokens(n), "") for i, n in enumerate(lengths)]
    return [Group(p, tuple(sample() for _ in range(n))) for p, n in zip(prompts, sizes, strict=True)]


def packed_of(groups: list[Group]) -> Packed:
    return pack(
        [torch.tensor(g.prompt.token_ids) for g in groups],
        [[torch.tensor(t.token_ids) for t in g.trajectories] for g in groups],
    )


@cache
def policy(folder: Path, packing: str, dtype: torch.dtype) -> Policy:
    """A policy whose attention is far from uniform, so that the tests notice which tokens a token sees."""
    policy = policy_of(folder, packing=packing, dtype=dtype)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                weight.mul_(6.0)
    return policy


def alone(policy: Policy, groups: list[Group]) -> Tensor:
    """Log-probs `[N]` by the model's own forward, head included, over one sequence at a time."""
    parts: list[Tensor] = []
    for g in groups:
        for t in g.trajectories:
            ids = torch.tensor(g.prompt.token_ids + t.token_ids)
            logits = policy.model(input_ids=ids[None]).logits[0, len(g.prompt.token_ids) - 1 : -1]
            parts.append(logits.log_softmax(-1).gather(-1, torch.tensor(t.token_ids)[:, None])[:, 0])
    return torch.cat(parts)


def logprobs(policy: Policy, groups: list[Group]) -> Tensor:
    got = policy.statistics(packed_of(groups), temperature=1.0, want=("logprob",)).logprob
    assert got is not None
    return got


def gradients(policy: Policy, output: Tensor) -> dict[str, Tensor]:
    """Gradients of a weighted sum of the outputs by every parameter."""
    policy.model.zero_grad()
    (output * torch.linspace(-1.0, 1.0, len(output), dtype=output.dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert (gradient - want[name]).abs().max() <= 1e-10 * want[name].abs().max(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_logprobs_and_gradients_are_those_of_each_sequence_alone(tiny_model: Folder, shape: str):
    model = policy(tiny_model(shape), "shared_prefix", torch.float64)
    groups = problem(1)
    assert model.layout == "shared_prefix"
    got, want = logprobs(model, groups), alone(policy(tiny_model(shape), "padded", torch.float64), groups)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert_same(gradients(model, got), gradients(policy(tiny_model(shape), "padded", torch.float64), want))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_learner_gets_the_loss_and_gradients_of_padded_sequences(
    tiny_model: Folder, shape: str, checkpointing: bool
):
    """GRPO with an exact KL: the reference goes through the same layout; several turns, masked tokens."""
    algorithm = ALGORITHMS["grpo"](kl=KL(coef=0.1, estimator="exact"), entropy_coef=0.01)
    results: list[tuple[float, dict[str, Tensor]]] = []
    for packing in ("shared_prefix", "padded"):
        model = policy_of(tiny_model(shape), packing=packing, dtype=torch.float64)
        model.model.load_state_dict(policy(tiny_model(shape), packing, torch.float64).model.state_dict())
        reference = policy_of(tiny_model(shape), packing=packing, dtype=torch.float64)
        if checkpointing:
            model.checkpoint_activations()
        learner, builder = learner_of(model, algorithm, reference, microbatch_tokens=90)
        experience = builder.build(problem(2), kl_coef=0.1)
        assert experience.turn.max() >= 1 and not experience.loss_mask.all()
        everyone = list(range(len(experience.prompts)))
        counts = learner.counts(experience, everyone)
        metrics = merge(learner.accumulate(experience, everyone, counts, 0.1))
        loss = metrics["loss/policy"].value + 0.1 * metrics["kl/exact"].value
        grads = {n: p.grad.clone() for n, p in model.model.named_parameters() if p.grad is not None}
        results.append((loss, grads))
    (loss, got), (expected, want) = results
    assert loss == pytest.approx(expected, rel=1e-10)
    assert_same(got, want)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float32_packed_is_no_further_from_the_truth_than_padded(tiny_model: Folder, shape: str):
    folder = tiny_model(shape)
    square = {"shared_prefix": [0.0, 0.0], "padded": [0.0, 0.0]}
    for seed in range(6):
        groups = problem(seed)
        exact = policy(folder, "padded", torch.float64)
        truth = alone(exact, groups)
        true_gradients = gradients(exact, truth)
        for packing, sums in square.items():
            model = policy(folder, packing, torch.float32)
            got = logprobs(model, groups)
            sums[0] += (got - truth).square().sum().item()
            for name, gradient in gradients(model, got).items():
                scale = true_gradients[name].abs().max()
                sums[1] += ((gradient - true_gradients[name]) / scale).square().mean().item()
    for shared, padded in zip(square["shared_prefix"], square["padded"], strict=True):
        assert 0 < shared**0.5 <= 1.25 * padded**0.5


@pytest.mark.parametrize("shape", ["llama-tied", "gemma"])
def test_values_from_the_packed_hidden_states_are_those_of_padded_ones(tiny_model: Folder, shape: str):
    """A critic: a linear head on the hidden states of the same layout."""
    torch.manual_seed(0)
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    head = nn.Linear(32, 1, dtype=torch.float64)
    for packing in ("shared_prefix", "padded"):
        model = policy(tiny_model(shape), packing, torch.float64)
        values = head(model.hidden(packed_of(problem(3))))[:, 0]
        results.append((values.detach(), gradients(model, values)))
    (values, got), (expected, want) = results
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
    assert_same(got, want)
