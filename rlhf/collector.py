"""Prompts -> scored groups: the rollouts of one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from rlhf.algos.algorithm import Algorithm
from rlhf.budgets import Budgets
from rlhf.config import RolloutConfig
from rlhf.data import PromptDataset, order
from rlhf.distributed import World, derive_seed
from rlhf.metrics import Mean, Metrics, Sum, merge
from rlhf.pretrained import decoded
from rlhf.rewards import Rewards
from rlhf.rollout.engine import RolloutEngine, RolloutRequest, SamplingParams, generate
from rlhf.types import Completion, FinishReason, Group, Prompt


@dataclass(frozen=True, slots=True)
class Sampler:
    """Requests to an engine and completions to groups, for training and for evaluation alike."""

    engine: RolloutEngine
    rewards: Rewards
    tokenizer: PreTrainedTokenizerBase
    section: RolloutConfig
    seed: int

    def request(self, prompt: Prompt, *, n: int, label: str) -> RolloutRequest:
        """`label` names the draw: it makes the request's id unique and its seed its own."""
        params = SamplingParams(
            n=n,
            max_tokens=self.section.max_completion_tokens,
            seed=derive_seed(self.seed, label),
            temperature=self.section.temperature,
            top_p=self.section.top_p,
            top_k=self.section.top_k,
            stop_token_ids=self.section.stop_token_ids,
        )
        return RolloutRequest(replace(prompt, id=f"{prompt.id}@{label}"), params)

    def generate(
        self, requests: Sequence[RolloutRequest], between: Callable[[], None] | None = None
    ) -> list[list[Completion]]:
        return generate(self.engine, requests, between=between)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], step: int
    ) -> tuple[list[Group], Metrics]:
        texts = [[self.text(c) for c in group] for group in completions]
        return self.rewards.score(prompts, completions, texts, trainer_state={"global_step": step})

    def text(self, completion: Completion) -> str:
        """What a reward reads: special tokens left out."""
        return decoded(self.tokenizer, completion.token_ids)


@dataclass(frozen=True, slots=True)
class Collected:
    """The groups of one step on this rank, and where the cursor stands for the next one."""

    groups: list[Group]
    sampled: list[Group]
    """With those the algorithm did not keep."""
    position: int
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class _Hooks:
    """What the trainer gives for one step: its number, how to name a phase, what to call while waiting."""

    step: int
    phase: Callable[[str], object]
    between: Callable[[], None]


class Collector:
    """Draws prompts in the cursor's order, a share for each rank, and refills what the algorithm drops."""

    def __init__(
        self, sampler: Sampler, prompts: PromptDataset, algorithm: Algorithm, budgets: Budgets, world: World
    ) -> None:
        self.sampler, self.prompts, self.algorithm, self.world = sampler, prompts, algorithm, world
        self.budgets = budgets

    def collect(
        self, position: int, *, step: int, phase: Callable[[str], object], between: Callable[[], None]
    ) -> Collected:
        """`position`: how many prompts the run has drawn so far, over all ranks and refills."""
        section = self.sampler.section
        wanted = self.world.share(section.prompts_per_step)
        kept: list[Group] = []
        sampled: list[Group] = []
        parts: list[Metrics] = []
        for _ in range(1 + self.algorithm.refill):
            missing = self.world.gather(wanted - len(kept))
            if not any(missing):
                break
            first = position + sum(missing[: self.world.rank])
            draws = range(first, first + missing[self.world.rank])
            position += sum(missing)
            groups, metrics = self._rollout(draws, _Hooks(step, phase, between))
            sampled += groups
            kept += [g for g in groups if self.algorithm.keep(g)]
            parts.append(metrics)
        metrics = merge(parts) | {"rollout/groups": Sum(float(len(kept)))}
        return Collected(kept, sampled, position, metrics)

    def _rollout(self, draws: range, hooks: _Hooks) -> tuple[list[Group], Metrics]:
        indices = order(self.sampler.seed, len(self.prompts), draws.start, len(draws))
        prompts = [self.prompts[i] for i in indices]
        labels = [f"rollout/{draw}" for draw in draws]
        groups, metrics = self._sample(prompts, self.budgets.sizes(prompts), labels, hooks)
        rest = self.budgets.rest(groups)
        if any(any(sizes) for sizes in self.world.gather(rest)):
            labels = [f"{label}/rest" for label in labels]
            others, more = self._sample(prompts, rest, labels, hooks)
            groups = [
                Group(g.prompt, g.trajectories + h.trajectories) for g, h in zip(groups, others, strict=True)
            ]
            metrics = merge([metrics, more])
        return groups, metrics | length_metrics(groups)

    def _sample(
        self, prompts: Sequence[Prompt], sizes: Sequence[int], labels: Sequence[str], hooks: _Hooks
    ) -> tuple[list[Group], Metrics]:
        """A group of each prompt, without completions where its size is 0."""
        requests = [
            self.sampler.request(prompt, n=size, label=label)
            for prompt, size, label in zip(prompts, sizes, labels, strict=True)
            if size
        ]
        hooks.phase("rollout")
        sampled = iter(self.sampler.generate(requests, hooks.between))
        completions = [next(sampled) if size else [] for size in sizes]
        hooks.phase("reward")
        return self.sampler.score(prompts, completions, hooks.step)


def length_metrics(groups: Sequence[Group]) -> Metrics:
    """Lengths in tokens that the policy chose, and why completions ended."""
    lengths = [sum(t.loss_mask) for g in groups for t in g.trajectories]
    truncated = sum(t.finish_reason == FinishReason.LENGTH for g in groups for t in g.trajectories)
    count = float(len(lengths))
    return {
        "length/mean": Mean(float(sum(lengths)), count),
        "length/truncated": Mean(float(truncated), count),
        "rollout/tokens": Sum(float(sum(lengths))),
        "rollout/samples": Sum(count),
    }
