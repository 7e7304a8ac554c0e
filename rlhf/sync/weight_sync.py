"""Learner -> engine: every weight sync ends with a proof that the engine samples from the learner's policy.

1. An engine with weights of its own compares them, bit for bit, with those it was sent (rollout/proof.py).
2. The engine decodes a few tokens with the run's sampling settings, several samples of one prompt, so that
   all but the first find it in the cache; the learner scores the same tokens. Beyond the rounding of the
   compute type, or where a sampling setting explains a smaller difference (diagnosis.py), the run stops.
3. Before the first sync counts, the engine is sent weights in a wrong order: the probe must see that.

A stale head, a skipped layer or another temperature would otherwise train on samples of a policy that does
not exist.
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
from rlhf.types import Candidates, Prompt

PROBE_TOKENS, PROBE_SAMPLES = 8, 4
PROBED_TOKENS, CUT_AT = 32, 48
"""Of a prompt, at least: two blocks of vLLM's cache; and where a longer one is cut, which costs the proof
nothing: attention over many tokens was compared with the model's own when the run began."""
SUSPECT = 0.1
"""A mean difference below this share of the tolerance is not looked into."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reading:
    """One probe. `difference`: mean |log-prob of the engine - log-prob of the learner|, nats."""

    difference: float
    engine: Tensor
    packed: Packed
    cut_elsewhere: float = 0.0
    """Mean |difference| of the logarithm of what truncation left, engine and learner, nats."""


@runtime_checkable
class Sync(Protocol):
    """Hands the learner's weights to an engine."""

    def push(self, engine: RolloutEngine, version: int) -> SyncReport: ...


class WeightSync:
    """`tolerance`: largest mean |difference| of log-probs, in nats. `prompt`: any real prompt of the run.

    `return_candidates`: the engine has to say what truncation left for each token.
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
        self._proven = False
        self._source: WeightSource = self
        adapter = policy.adapter
        if adapter is not None and section.vllm.lora == "adapter":
            merged = policy.rollout_model
            base, factors = Part(merged, adapter.base_weights), Part(merged, adapter.factors)
            self._source = InParts(merged, self.named_tensors, base, factors)

    @property
    def module(self) -> nn.Module:
        return self.policy.rollout_model

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from gathered(self.module)

    def push(self, engine: RolloutEngine, version: int) -> SyncReport:
        """Hands the weights over and proves them. Raises SyncError, which names what differs and by how
        much.
        """
        if self._source is self:
            self.policy.merge()
            self._check_adapter(version)
        report = engine.update_weights(self._source, version)
        if report.bytes and not self._proven:
            self._prove_the_probe(engine, version)
            report = engine.update_weights(self._source, version)
            if report.unread:
                log.warning(
                    "%d weights of the engine cannot be read back after an update (%s, ...): whether it "
                    "holds them is seen in log-probs only",
                    len(report.unread),
                    report.unread[0],
                )
        self._proven = True
        self._check(engine, self.probe(engine), version)
        return report

    def _check_adapter(self, version: int) -> None:
        outdated = None if self.policy.adapter is None else self.policy.adapter.outdated()
        if outdated is not None:
            name, difference = outdated
            raise SyncError(
                f"at version {version} the engine would sample from a weight of {name} that is not merged "
                f"from the adapter of now: it differs by up to {difference:.3g}"
            )

    def _prove_the_probe(self, engine: RolloutEngine, version: int) -> None:
        engine.update_weights(_shuffled(self._source), version)
        seen = self.probe(engine).difference
        if seen <= 10 * self.tolerance:
            raise SyncError(
                f"{type(engine).__name__} was sent weights in a wrong order, and its log-probs differ from "
                f"the learner's by {seen:.3g} nats only: it does not sample from the weights it is sent"
            )

    def _check(self, engine: RolloutEngine, reading: Reading, version: int) -> None:
        found, name = reading.difference, type(engine).__name__
        if not math.isfinite(found):
            raise SyncError(
                f"after update {version} the log-probs are not finite: the weights have diverged. Go on from "
                "an earlier checkpoint with a lower learner.lr"
            )
        if reading.cut_elsewhere > self.tolerance:
            raise SyncError(
                f"{name} at version {version} keeps other tokens than rollout.top_k, top_p and min_p say "
                f"({self.section.top_k}, {self.section.top_p} and {self.section.min_p}): their share differs "
                f"by {reading.cut_elsewhere:.3g} nats in the mean over {len(reading.engine)} tokens"
            )
        if found <= SUSPECT * self.tolerance:
            return
        cause = None
        if not self.section.truncates:
            logits = self.policy.logits(reading.packed)
            left = LIKELY if found > self.tolerance else EXPLAINED
            targets, temperature = reading.packed.targets, self.section.temperature
            cause = diagnose(logits, targets, reading.engine, temperature, left)
        differs = (
            f"{name} at version {version}: its log-probs differ from the learner's by {found:.3g} nats in "
            f"the mean over {len(reading.engine)} tokens"
        )
        if cause is not None:
            raise SyncError(f"{differs}, but for {cause.left:.3g} because of the {cause.text}")
        if found > self.tolerance:
            raise SyncError(
                f"{differs} (rollout.sync_tolerance is {self.tolerance:.3g}); it does not hold the weights "
                "it was given, or samples from them differently"
            )

    @torch.no_grad()
    def probe(self, engine: RolloutEngine) -> Reading:
        """Decodes with the settings of the run, and scores.

        Raises SyncError: the engine does not return the candidates.
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
        rollout = torch.tensor(sampled, device=device)
        scored, elsewhere = self._score(packed), 0.0
        if self.section.truncates:
            by_settings = self._score_by_settings(packed)
            elsewhere = (by_settings - scored).abs().mean().item() if self.return_candidates else 0.0
            scored = scored if self.return_candidates else by_settings
        return Reading((scored - rollout).abs().mean().item(), rollout, packed, elsewhere)

    def _score(self, packed: Packed) -> Tensor:
        """Log-probs, among the candidates where these are known."""
        temperature = self.section.temperature
        logprob = self.policy.statistics(packed, temperature=temperature, want=("logprob",)).logprob
        assert logprob is not None
        return logprob

    def _score_by_settings(self, packed: Packed) -> Tensor:
        """Log-probs, renormalised as the settings truncate the learner's own distribution.

        A token at the very edge, which the learner's rounding leaves out, has one too.
        """
        section = self.section
        probs = (self.policy.logits(packed) / section.temperature).softmax(-1)
        top_k = packed.targets.new_full((len(probs),), section.top_k)
        top_p = probs.new_full((len(probs),), section.top_p, dtype=torch.float64)
        left = truncate(probs, top_k, top_p, probs.new_full((len(probs),), section.min_p))
        return probs.gather(1, packed.targets[:, None])[:, 0].log() - left.sum(-1).log()


def probed(prompts: Sequence[Prompt]) -> Prompt:
    """The prompt that costs least of those that show enough: one with pictures where there is any, since it
    takes more of the weights, and long enough to be found in a cache. Of text, its beginning."""
    telling = [prompt for prompt in prompts if prompt.images] or prompts
    long = [prompt for prompt in telling if len(prompt.token_ids) >= PROBED_TOKENS]
    least = min(long or telling, key=lambda prompt: len(prompt.token_ids))
    return least if least.images else replace(least, token_ids=least.token_ids[:CUT_AT])


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some of the learner's weights."""

    module: nn.Module
    named_tensors: Callable[[], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True, slots=True, eq=False)
class InParts:
    """All of them, and the two parts they are made of."""

    module: nn.Module
    named_tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    base: WeightSource
    adapter: WeightSource


def _shuffled(source: WeightSource) -> WeightSource:
    """The rows of every matrix moved on by one and made 8 times as large; an adapter stays as it is."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in source.named_tensors():
            yield name, 8 * tensor.detach().roll(1, 0) if tensor.ndim > 1 else tensor

    if isinstance(source, InParts):
        return InParts(source.module, tensors, _shuffled(source.base), source.adapter)
    return Part(source.module, tensors)
