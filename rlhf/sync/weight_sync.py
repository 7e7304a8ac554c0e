"""Weight sync: sends the weights to the engine and checks that it samples from the learner's policy.

1. An engine with its own copy of the weights compares it, bit for bit, with what it was sent
   (rollout/weight_proof.py).
2. The probe: the engine decodes a few tokens with the run's sampling settings, and the learner scores the
   same tokens. There are several samples of one prompt, so that all but the first find the prompt in the
   engine's cache. The run stops if the log-probs differ by more than the rounding of the compute type, or if
   a sampling setting explains a smaller difference (diagnosis.py).
3. At the first sync the engine is also sent wrong weights, to check that the probe notices them.

Without these checks, an engine with an old head, a skipped layer or another temperature would go unnoticed,
and the run would learn from samples of another policy than the one it trains.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rlhf.config.rollout import RolloutConfig
from rlhf.models.packing import Packed, pack
from rlhf.models.policy import Policy
from rlhf.models.sharding import gathered
from rlhf.rollout.engine import (
    RolloutEngine,
    RolloutRequest,
    SyncError,
    SyncReport,
    WeightSource,
    generate,
    sampling_of,
)
from rlhf.rollout.sampling import truncate
from rlhf.sync.diagnosis import EXPLAINED, LIKELY, diagnose
from rlhf.tensors.candidates import Candidates
from rlhf.types import Prompt

PROBE_TOKENS, PROBE_SAMPLES = 8, 4
"""Tokens of each completion of the probe, and the number of its completions."""
SHORTEST_PROBE_PROMPT, LONGEST_PROBE_PROMPT = 32, 48
"""Tokens of the probe's prompt: at least two blocks of vLLM's cache, so that cached keys are checked too.

Longer prompts are cut. That weakens nothing: when the run began, attention over many tokens was compared with
the model's own.
"""
NEGLIGIBLE = 0.1
"""No cause is looked for below this share of the tolerance."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The engine's log-probs of a few tokens, compared with the learner's."""

    difference: float
    """Mean |log-prob of the engine - log-prob of the learner|, nats."""
    engine: Tensor
    """Log-probs `[N]` of the engine."""
    packed: Packed
    """The N tokens, for the learner."""
    truncation_difference: float = 0.0
    """Mean |difference| between log-probs over the engine's candidates and over those that the settings give,
    both by the learner, nats: larger than 0 if the engine truncates otherwise."""


@runtime_checkable
class Sync(Protocol):
    """Sends the learner's weights to an engine."""

    prompt: Prompt
    """What the probe completes."""
    tolerance: float
    """Largest mean difference of log-probs, in nats."""

    def push(self, engine: RolloutEngine, version: int) -> SyncReport: ...


class WeightSync:
    """Sends the weights of `policy` to engines and checks each time that they sample from it.

    `prompt`: a prompt of the run for the probe. `tolerance`: largest mean |difference| of log-probs, in nats.
    `return_candidates`: the engine has to return the candidates of truncated sampling for each token.
    """

    def __init__(
        self,
        policy: Policy,
        prompt: Prompt,
        section: RolloutConfig,
        *,
        tolerance: float,
        return_candidates: bool = False,
    ) -> None:
        self.policy, self.section, self.tolerance, self.return_candidates = (
            policy,
            section,
            tolerance,
            return_candidates,
        )
        self.prompt = replace(prompt, id="weight-sync-probe", columns={})
        self._probe_is_checked = False
        self._source: WeightSource = self
        adapter = policy.adapter
        if adapter is not None and section.vllm.lora == "adapter":
            merged = policy.rollout_model
            base, factors = Weights(merged, adapter.base_weights), Weights(merged, adapter.factors)
            self._source = AdaptedWeights(merged, self.named_tensors, base, factors)

    @property
    def module(self) -> nn.Module:
        """The model that the engine samples from; part of `WeightSource`, as `named_tensors` is."""
        return self.policy.rollout_model

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from gathered(self.module)

    def push(self, engine: RolloutEngine, version: int) -> SyncReport:
        """Sends the weights of `version` and checks them.

        Raises SyncError, which names what differs and by how much.
        """
        # an engine that takes base weights and adapter apart needs no merged ones
        if self._source is self:
            self.policy.merge()
            self._check_adapter(version)
        report = engine.update_weights(self._source, version)
        # an engine that shares the learner's memory is sent no bytes, and cannot be given wrong weights
        if report.bytes and not self._probe_is_checked:
            self._check_the_probe(engine, version)
            report = engine.update_weights(self._source, version)
            if report.unread:
                log.warning(
                    "%d weights of the engine cannot be read back after an update (%s, ...): whether they "
                    "are the learner's is checked by log-probs only",
                    len(report.unread),
                    report.unread[0],
                )
        self._probe_is_checked = True
        self._check(engine, self.probe(engine), version)
        return report

    def _check_adapter(self, version: int) -> None:
        """Raises SyncError when a weight of the merged model is not up to date with the adapter."""
        outdated = None if self.policy.adapter is None else self.policy.adapter.outdated()
        if outdated is not None:
            name, difference = outdated
            raise SyncError(
                f"at version {version} the engine would sample from a weight of {name} that is not merged "
                f"from the adapter of now: it differs by up to {difference:.3g}"
            )

    def _check_the_probe(self, engine: RolloutEngine, version: int) -> None:
        """Sends wrong weights. Raises SyncError when the probe does not notice them."""
        engine.update_weights(_shuffled(self._source), version)
        difference = self.probe(engine).difference
        if difference <= 10 * self.tolerance:
            raise SyncError(
                f"{type(engine).__name__} was sent weights in a wrong order, and its log-probs differ from "
                f"the learner's by {difference:.3g} nats only: it does not sample from the weights it is sent"
            )

    def _check(self, engine: RolloutEngine, result: ProbeResult, version: int) -> None:
        """Raises SyncError when the log-probs of a probe differ, and names the cause where one is found."""
        difference, name = result.difference, type(engine).__name__
        if not math.isfinite(difference):
            raise SyncError(
                f"after update {version} the log-probs are not finite: the weights have diverged. Go on from "
                "an earlier checkpoint with a lower learner.lr"
            )
        if result.truncation_difference > self.tolerance:
            raise SyncError(
                f"{name} at version {version} keeps other tokens than rollout.top_k, top_p and min_p say "
                f"({self.section.top_k}, {self.section.top_p} and {self.section.min_p}): their share differs "
                f"by {result.truncation_difference:.3g} nats in the mean over {len(result.engine)} tokens"
            )
        if difference <= NEGLIGIBLE * self.tolerance:
            return
        cause = None
        if not self.section.truncates:
            logits = self.policy.logits(result.packed)
            # a difference within the tolerance may be rounding: then a cause has to explain more of it
            largest_share = LIKELY if difference > self.tolerance else EXPLAINED
            targets, temperature = result.packed.targets, self.section.temperature
            cause = diagnose(logits, targets, result.engine, temperature, largest_share)
        differs = (
            f"{name} at version {version}: its log-probs differ from the learner's by {difference:.3g} nats "
            f"in the mean over {len(result.engine)} tokens"
        )
        if cause is not None:
            raise SyncError(f"{differs}, all but {cause.unexplained:.3g} because of the {cause.text}")
        if difference > self.tolerance:
            raise SyncError(
                f"{differs} (rollout.sync_tolerance is {self.tolerance:.3g}); it does not hold the weights "
                "it was given, or samples from them differently"
            )

    @torch.no_grad()
    def probe(self, engine: RolloutEngine) -> ProbeResult:
        """Lets the engine decode with the settings of the run, and scores the tokens with the learner.

        Raises SyncError: the engine was to return the candidates and did not.
        """
        section = self.section
        params = sampling_of(
            section,
            n=PROBE_SAMPLES,
            max_tokens=PROBE_TOKENS,
            seed=0,
            return_candidates=self.return_candidates,
        )
        (group,) = generate(engine, [RolloutRequest(self.prompt, params)])
        device = self.policy.head.module.weight.device
        packed = pack(
            [torch.tensor(self.prompt.token_ids, device=device)],
            [[torch.tensor(completion.token_ids, device=device) for completion in group]],
            [self.prompt.pictures],
        )
        candidates = [completion.candidates for completion in group if completion.candidates is not None]
        if self.return_candidates:
            if len(candidates) < len(group):
                raise SyncError(
                    f"{type(engine).__name__} does not say which tokens truncation left, so its log-probs "
                    "cannot be compared with the learner's; sample with rollout.top_p=1, top_k=0 and min_p=0"
                )
            packed = replace(packed, candidates=Candidates.join(candidates).to(device))
        sampled = [logprob for completion in group for logprob in completion.rollout_logprobs or ()]
        rollout = torch.tensor(sampled, device=device)  # [N]
        scored, truncation_difference = self._score(packed), 0.0
        if self.section.truncates:
            by_settings = self._score_by_settings(packed)
            if self.return_candidates:
                truncation_difference = (by_settings - scored).abs().mean().item()
            else:
                scored = by_settings
        return ProbeResult((scored - rollout).abs().mean().item(), rollout, packed, truncation_difference)

    def _score(self, packed: Packed) -> Tensor:
        """Log-probs `[N]` by the learner, over the engine's candidates where these are known."""
        temperature = self.section.temperature
        logprob = self.policy.statistics(packed, temperature=temperature, want=("logprob",)).logprob
        assert logprob is not None
        return logprob

    def _score_by_settings(self, packed: Packed) -> Tensor:
        """Log-probs `[N]` by the learner, renormalised over the tokens that the settings keep.

        A token that rounding just leaves out of them gets a log-prob too.
        """
        section = self.section
        probs = (self.policy.logits(packed) / section.temperature).softmax(-1)
        top_k = packed.targets.new_full((len(probs),), section.top_k)
        top_p = probs.new_full((len(probs),), section.top_p, dtype=torch.float64)
        kept = truncate(probs, top_k, top_p, probs.new_full((len(probs),), section.min_p))
        return probs.gather(1, packed.targets[:, None])[:, 0].log() - kept.sum(-1).log()


def choose_probe_prompt(prompts: Sequence[Prompt]) -> Prompt:
    """The shortest prompt of a run that makes a sufficient probe.

    Prompts with images are preferred, because they use the vision tower's weights too. It has at least
    `SHORTEST_PROBE_PROMPT` tokens if any has, and text is cut at `LONGEST_PROBE_PROMPT`.
    """
    preferred = [prompt for prompt in prompts if prompt.images] or prompts
    long = [prompt for prompt in preferred if len(prompt.token_ids) >= SHORTEST_PROBE_PROMPT]
    shortest = min(long or preferred, key=lambda prompt: len(prompt.token_ids))
    # placeholders of images must stay complete
    if shortest.images:
        return shortest
    return replace(shortest, token_ids=shortest.token_ids[:LONGEST_PROBE_PROMPT])


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A `WeightSource` of some of the learner's weights: the frozen ones, or the adapter's factors."""

    module: nn.Module
    named_tensors: Callable[[], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedWeights:
    """An `AdaptedSource`: the merged weights, and apart from them the frozen ones and the adapter."""

    module: nn.Module
    named_tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    base: WeightSource
    adapter: WeightSource


def _shuffled(source: WeightSource) -> WeightSource:
    """Wrong weights: rows of every matrix moved on by one and multiplied by 8; an adapter is unchanged."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in source.named_tensors():
            yield name, 8 * tensor.detach().roll(1, 0) if tensor.ndim > 1 else tensor

    if isinstance(source, AdaptedWeights):
        return AdaptedWeights(source.module, tensors, _shuffled(source.base), source.adapter)
    return Weights(source.module, tensors)
