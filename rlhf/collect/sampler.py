"""Samples completions from the rollout engine and has them scored, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.collect.episodes import Episodes
from rlhf.config.rollout import RolloutConfig
from rlhf.distributed.world import derive_seed
from rlhf.metrics import Mean, Metrics, Sum
from rlhf.models.pretrained import decoded
from rlhf.rewards.scoring import Rewards, Scoring
from rlhf.rollout.engine import Measured, RolloutEngine, RolloutRequest, generate, sampling_of
from rlhf.rollout.episode import Episode, Sample, Turn
from rlhf.types import Completion, FinishReason, Group, Prompt, Source


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the trainer passes for one step.

    `step`: its number. `phase`: called with the name of each phase. `between`: called while waiting.
    `detail`: called with how far the phase is, in words.
    """

    step: int
    phase: Callable[[str], object]
    between: Callable[[], None]
    detail: Callable[[str], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class Sampler:
    """Makes requests to an engine, and groups from the completions; training and evaluation both use it."""

    engine: RolloutEngine
    """An `EngineGroup` where `section.samplers` sample from other models than the policy."""
    rewards: Rewards
    tokenizer: PreTrainedTokenizerBase
    section: RolloutConfig
    seed: int
    return_candidates: bool = False
    """Whether rollouts for training return the candidates that truncated sampling left."""
    episodes: Episodes | None = None
    """What answers the policy between its turns; None: a sample is one completion."""

    def request(
        self, prompt: Prompt, *, n: int, label: str, return_candidates: bool = False
    ) -> RolloutRequest:
        """A request to the policy for `n` completions; `label` names the draw, and its seed and request id
        depend on it.
        """
        limit, seed = self.section.max_completion_tokens, derive_seed(self.seed, label)
        params = sampling_of(
            self.section, n=n, max_tokens=limit, seed=seed, return_candidates=return_candidates
        )
        return RolloutRequest(replace(prompt, id=f"{prompt.id}@{label}"), params)

    def _requests(self, prompt: Prompt, size: int, label: str) -> list[RolloutRequest]:
        """One request for a group of `size`, or one for each of `section.samplers`."""
        candidates = self.return_candidates
        if not self.section.samplers:
            return [self.request(prompt, n=size, label=label, return_candidates=candidates)]
        requests: list[RolloutRequest] = []
        for number, sampler in enumerate(self.section.samplers):
            asked = self.request(prompt, n=sampler.n, label=f"{label}/{number}", return_candidates=candidates)
            temperature = self.section.temperature if sampler.temperature is None else sampler.temperature
            params = replace(asked.params, temperature=temperature)
            source, mixture = Source(sampler.source), sampler.mixture or 0.0
            requests.append(replace(asked, params=params, source=source, mixture=mixture))
        return requests

    def _as_learned(self, request: RolloutRequest, sample: Sample) -> Sample:
        """The sample with its source. Its log-probs are those that the learner computes only where the
        policy sampled it at the learner's temperature.
        """
        if request.source == Source.POLICY and request.params.temperature == self.section.temperature:
            return sample
        if isinstance(sample, Episode):
            turns: list[Turn] = [
                _not_own(turn, request.source) if isinstance(turn, Completion) else turn
                for turn in sample.turns
            ]
            return replace(sample, turns=tuple(turns))
        return _not_own(sample, request.source)

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        between: Callable[[], None] | None = None,
        detail: Callable[[str], None] | None = None,
    ) -> list[list[Sample]]:
        seeds = [derive_seed(request.params.seed, "environment") for request in requests]
        return self._sampled(requests, seeds, between, arrived=detail and counted(detail))

    def _sampled(
        self,
        requests: Sequence[RolloutRequest],
        seeds: Sequence[int],
        between: Callable[[], None] | None,
        finished: Callable[[int, list[Sample]], None] | None = None,
        arrived: Callable[[int, int], None] | None = None,
    ) -> list[list[Sample]]:
        """As `generate` of an engine; `seeds` are those of environments."""
        told: Callable[[int, Any], None] | None = finished
        if self.episodes is None:
            found = generate(self.engine, requests, between=between, finished=told, arrived=arrived)
        else:
            found = self.episodes.run(requests, seeds, between=between, finished=told, arrived=arrived)
        return [list(samples) for samples in found]

    def measured(self) -> Metrics:
        """The engine's own metrics since the last call; none if it has no metrics."""
        return self.engine.measured() if isinstance(self.engine, Measured) else {}

    def rollout(
        self, prompts: Sequence[Prompt], sizes: Sequence[int], labels: Sequence[str], hooks: Hooks
    ) -> list[Scoring]:
        """Samples a group of `sizes[i]` completions, perhaps 0, for each prompt and submits it for scoring.

        A group is submitted as soon as it is complete, while others are still decoded. If a reward function
        needs the whole step in one call, all groups are submitted together at the end.
        """
        of_prompt = [
            self._requests(prompts[p], sizes[p], labels[p]) if sizes[p] else [] for p in range(len(prompts))
        ]
        places = [(p, part) for p, asked in enumerate(of_prompt) for part in range(len(asked))]
        requests = [of_prompt[p][part] for p, part in places]
        # what a draw samples again, for a budget, begins like what it sampled before
        starts = [derive_seed(self.seed, "environment", label.removesuffix("/rest")) for label in labels]
        done: list[dict[int, list[Sample]]] = [{} for _ in prompts]
        groups: list[list[Sample]] = [[] for _ in prompts]
        scorings: dict[int, Scoring] = {}
        together = self.rewards.sees_whole_step

        def finished(number: int, part: list[Sample]) -> None:
            place, sampler = places[number]
            done[place][sampler] = [self._as_learned(requests[number], c) for c in part]
            if len(done[place]) < len(of_prompt[place]):
                return
            whole = [c for _, own in sorted(done[place].items()) for c in own]
            group = [replace(c, index=i) if c.index != i else c for i, c in enumerate(whole)]
            groups[place] = group
            if not together:
                scorings[place] = self._submit([prompts[place]], [group], hooks.step, step_samples=sum(sizes))

        hooks.phase("rollout")
        arrived = counted(hooks.detail)
        seeds = [starts[p] for p, _ in places]
        self._sampled(requests, seeds, hooks.between, finished, arrived)
        if together:
            return [self._submit(prompts, groups, hooks.step)]
        for place in set(range(len(prompts))) - set(scorings):
            scorings[place] = self._submit([prompts[place]], [[]], hooks.step)
        return [scorings[place] for place in range(len(prompts))]

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Sample]], step: int
    ) -> tuple[list[Group], Metrics]:
        """Scores the completions and waits for the rewards; returns groups and metrics."""
        return self._submit(prompts, completions, step).result()

    def _submit(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Sample]],
        step: int,
        step_samples: int | None = None,
    ) -> Scoring:
        prompts = [_prompt_used(p, group) for p, group in zip(prompts, completions, strict=True)]
        texts = [[self.text(c) for c in group] for group in completions]
        state = {"global_step": step}
        return self.rewards.submit(
            prompts, completions, texts, trainer_state=state, step_samples=step_samples
        )

    def text(self, sample: Sample) -> str:
        """The text of a sample as rewards read it (`reward.special_tokens`)."""
        return decoded(self.tokenizer, sample.token_ids, self.rewards.dropped_tokens)


def _not_own(completion: Completion, source: Source) -> Completion:
    """A completion of another model, or of the policy at another temperature."""
    return replace(completion, source=source, rollout_logprobs=None, versions=(), candidates=None)


def _prompt_used(prompt: Prompt, samples: Sequence[Sample]) -> Prompt:
    """The prompt with what the environment put behind it, which all samples that were not lost share."""
    used = next((s.prompt for s in samples if isinstance(s, Episode) and s.turns), None)
    if used is None or used.original is None:
        return prompt
    return replace(used, id=prompt.id, original=prompt)


def counted(detail: Callable[[str], None]) -> Callable[[int, int], None]:
    """`arrived` of `generate`, as words for `detail`."""
    return lambda done, total: detail(f"{done} of {total} samples")


def length_metrics(groups: Sequence[Group]) -> Metrics:
    """Metrics of completions: tokens that the policy chose, share truncated, and totals."""
    lengths = [sum(t.loss_mask) for g in groups for t in g.trajectories]
    truncated = sum(t.finish_reason == FinishReason.LENGTH for g in groups for t in g.trajectories)
    count = float(len(lengths))
    return {
        "length/mean": Mean(float(sum(lengths)), count),
        "length/truncated": Mean(float(truncated), count),
        "rollout/tokens": Sum(float(sum(lengths))),
        "rollout/samples": Sum(count),
    }
