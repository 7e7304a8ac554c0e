"""Samples completions from the rollout engine and has them scored, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from rlhf.config.rollout import RolloutConfig
from rlhf.distributed.world import derive_seed
from rlhf.metrics import Mean, Metrics, Sum
from rlhf.models.pretrained import decoded
from rlhf.rewards.scoring import Rewards, Scoring
from rlhf.rollout.engine import Measured, RolloutEngine, RolloutRequest, generate, sampling_of
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

    def _as_learned(self, request: RolloutRequest, completion: Completion) -> Completion:
        """The completion with its source. Its log-probs are those that the learner computes only where the
        policy sampled it at the learner's temperature.
        """
        if request.source == Source.POLICY and request.params.temperature == self.section.temperature:
            return completion
        return replace(completion, source=request.source, rollout_logprobs=None, versions=(), candidates=None)

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        between: Callable[[], None] | None = None,
        detail: Callable[[str], None] | None = None,
    ) -> list[list[Completion]]:
        return generate(self.engine, requests, between=between, arrived=detail and counted(detail))

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
        done: list[dict[int, list[Completion]]] = [{} for _ in prompts]
        groups: list[list[Completion]] = [[] for _ in prompts]
        scorings: dict[int, Scoring] = {}
        together = self.rewards.sees_whole_step

        def finished(number: int, part: list[Completion]) -> None:
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
        generate(self.engine, requests, between=hooks.between, finished=finished, arrived=arrived)
        if together:
            return [self._submit(prompts, groups, hooks.step)]
        for place in set(range(len(prompts))) - set(scorings):
            scorings[place] = self._submit([prompts[place]], [[]], hooks.step)
        return [scorings[place] for place in range(len(prompts))]

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], step: int
    ) -> tuple[list[Group], Metrics]:
        """Scores the completions and waits for the rewards; returns groups and metrics."""
        return self._submit(prompts, completions, step).result()

    def _submit(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        step: int,
        step_samples: int | None = None,
    ) -> Scoring:
        texts = [[self.text(c) for c in group] for group in completions]
        state = {"global_step": step}
        return self.rewards.submit(
            prompts, completions, texts, trainer_state=state, step_samples=step_samples
        )

    def text(self, completion: Completion) -> str:
        """The text of a completion as rewards read it (`reward.special_tokens`)."""
        return decoded(self.tokenizer, completion.token_ids, self.rewards.dropped_tokens)


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
