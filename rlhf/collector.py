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
from rlhf.rewards import Rewards, Scoring, reward_metrics
from rlhf.rollout.engine import Measured, RolloutEngine, RolloutRequest, SamplingParams, generate
from rlhf.types import Completion, FinishReason, Group, Prompt


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the trainer gives for one step: its number, how to name a phase, what to call while waiting."""

    step: int
    phase: Callable[[str], object]
    between: Callable[[], None]


def sampling_of(
    section: RolloutConfig, *, n: int, max_tokens: int, seed: int, says_kept: bool
) -> SamplingParams:
    """How a run samples."""
    return SamplingParams(
        n=n,
        max_tokens=max_tokens,
        seed=seed,
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        min_p=section.min_p,
        stop_token_ids=section.stop_token_ids,
        says_kept=says_kept,
    )


@dataclass(frozen=True, slots=True)
class Sampler:
    """Requests to an engine and completions to groups, for training and for evaluation alike."""

    engine: RolloutEngine
    rewards: Rewards
    tokenizer: PreTrainedTokenizerBase
    section: RolloutConfig
    seed: int
    says_kept: bool = False
    """Rollouts that are learned from say what truncation left."""

    def request(self, prompt: Prompt, *, n: int, label: str, says_kept: bool = False) -> RolloutRequest:
        """`label` names the draw: it makes the request's id unique and its seed its own."""
        limit, seed = self.section.max_completion_tokens, derive_seed(self.seed, label)
        params = sampling_of(self.section, n=n, max_tokens=limit, seed=seed, says_kept=says_kept)
        return RolloutRequest(replace(prompt, id=f"{prompt.id}@{label}"), params)

    def generate(
        self, requests: Sequence[RolloutRequest], between: Callable[[], None] | None = None
    ) -> list[list[Completion]]:
        return generate(self.engine, requests, between=between)

    def measured(self) -> Metrics:
        """What the engine says about itself since it was asked last."""
        return self.engine.measured() if isinstance(self.engine, Measured) else {}

    def rollout(
        self, prompts: Sequence[Prompt], sizes: Sequence[int], labels: Sequence[str], hooks: Hooks
    ) -> list[Scoring]:
        """Samples a group of each prompt, without completions where its size is 0.

        Each is handed to the reward workers as soon as it is complete, while others decode; all of them at
        once, where a function wants to see the whole step.
        """
        places = [place for place, size in enumerate(sizes) if size]
        requests = [
            self.request(prompts[p], n=sizes[p], label=labels[p], says_kept=self.says_kept) for p in places
        ]
        groups: list[list[Completion]] = [[] for _ in prompts]
        scorings: dict[int, Scoring] = {}
        together = self.rewards.sees_whole_step

        def finished(number: int, group: list[Completion]) -> None:
            place = places[number]
            groups[place] = group
            if not together:
                scorings[place] = self._submit([prompts[place]], [group], hooks.step, of=sum(sizes))

        hooks.phase("rollout")
        generate(self.engine, requests, between=hooks.between, finished=finished)
        if together:
            return [self._submit(prompts, groups, hooks.step)]
        for place in set(range(len(prompts))) - set(scorings):
            scorings[place] = self._submit([prompts[place]], [[]], hooks.step)
        return [scorings[place] for place in range(len(prompts))]

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], step: int
    ) -> tuple[list[Group], Metrics]:
        return self._submit(prompts, completions, step).result()

    def _submit(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        step: int,
        of: int | None = None,
    ) -> Scoring:
        texts = [[self.text(c) for c in group] for group in completions]
        return self.rewards.submit(prompts, completions, texts, trainer_state={"global_step": step}, of=of)

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


class Pending:
    """The groups of a step, sampled, whose rewards may still be on their way."""

    def __init__(
        self, wait: Callable[[], Collected] | None = None, *, collected: Collected | None = None
    ) -> None:
        """Either what waits for the rewards and gives the whole, or the whole."""
        assert (wait is None) != (collected is None)
        self._wait, self._collected = wait, collected

    def settle(self) -> Collected:
        """Waits for them. Raises RewardError, which names the function."""
        if self._collected is None:
            assert self._wait is not None
            self._collected = self._wait()
        return self._collected


class Collector:
    """Draws prompts in the cursor's order, a share for each rank, and refills what the algorithm drops."""

    def __init__(
        self, sampler: Sampler, prompts: PromptDataset, algorithm: Algorithm, budgets: Budgets, world: World
    ) -> None:
        self.sampler, self.prompts, self.algorithm, self.world = sampler, prompts, algorithm, world
        self.budgets = budgets

    def collect(self, position: int, hooks: Hooks) -> Collected:
        """`position`: how many prompts the run has drawn so far, over all ranks and refills."""
        wanted = self.world.share(self.sampler.section.prompts_per_step)
        kept: list[Group] = []
        sampled: list[Group] = []
        parts: list[Metrics] = []
        for _ in range(1 + self.algorithm.refill):
            missing = self.world.gather(wanted - len(kept))
            if not any(missing):
                break
            draws, position = self._draws(position, missing)
            groups, metrics = self._rollout(draws, hooks)
            sampled += groups
            kept += [g for g in groups if self.algorithm.keep(g)]
            parts.append(metrics)
        metrics = merge(parts) | {"rollout/groups": Sum(float(len(kept)))} | self.sampler.measured()
        return Collected(kept, sampled, position, metrics)

    def begin(self, position: int, hooks: Hooks) -> Pending:
        """As `collect`, but rewards are not waited for, unless they decide what is sampled next."""
        if self.algorithm.refill or self.budgets.probes:
            return Pending(collected=self.collect(position, hooks))
        wanted = self.world.gather(self.world.share(self.sampler.section.prompts_per_step))
        draws, position = self._draws(position, wanted)
        prompts, labels = self._prompts(draws)
        scorings = self.sampler.rollout(prompts, self.budgets.sizes(prompts), labels, hooks)
        measured = self.sampler.measured()

        def wait() -> Collected:
            hooks.phase("reward")
            groups, metrics = self.sampler.rewards.gather(scorings)
            metrics |= measured
            groups = _drawn(groups, draws)
            kept = [g for g in groups if self.algorithm.keep(g)]
            metrics = metrics | length_metrics(groups) | {"rollout/groups": Sum(float(len(kept)))}
            return Collected(kept, groups, position, metrics)

        return Pending(wait)

    def _draws(self, position: int, wanted: Sequence[int]) -> tuple[range, int]:
        """Of this rank, when each draws as many as it wants; the position behind all of them."""
        first = position + sum(wanted[: self.world.rank])
        return range(first, first + wanted[self.world.rank]), position + sum(wanted)

    def _prompts(self, draws: range) -> tuple[list[Prompt], list[str]]:
        indices = order(self.sampler.seed, len(self.prompts), draws.start, len(draws))
        return [self.prompts[i] for i in indices], [f"rollout/{draw}" for draw in draws]

    def _rollout(self, draws: range, hooks: Hooks) -> tuple[list[Group], Metrics]:
        prompts, labels = self._prompts(draws)
        groups, metrics = self._sample(prompts, self.budgets.sizes(prompts), labels, hooks)
        rest = self.budgets.rest(groups)
        if any(any(sizes) for sizes in self.world.gather(rest)):
            labels = [f"{label}/rest" for label in labels]
            others, more = self._sample(prompts, rest, labels, hooks)
            groups = [
                Group(g.prompt, g.trajectories + h.trajectories) for g, h in zip(groups, others, strict=True)
            ]
            # a spread is that of whole groups
            metrics = merge([metrics, more]) | reward_metrics(groups)
        return _drawn(groups, draws), metrics | length_metrics(groups)

    def _sample(
        self, prompts: Sequence[Prompt], sizes: Sequence[int], labels: Sequence[str], hooks: Hooks
    ) -> tuple[list[Group], Metrics]:
        """A group of each prompt, scored."""
        scorings = self.sampler.rollout(prompts, sizes, labels, hooks)
        hooks.phase("reward")
        return self.sampler.rewards.gather(scorings)


def _drawn(groups: Sequence[Group], draws: Sequence[int]) -> list[Group]:
    return [replace(group, draw=draw) for group, draw in zip(groups, draws, strict=True)]


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
