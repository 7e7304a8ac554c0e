"""Learner -> engine: every weight sync ends with a probe of what the engine does with the weights it holds.

The engine decodes a few tokens on a fixed prompt, with the run's temperature; the learner scores the same
tokens. The two log-probs must agree within the rounding of the compute type, or the run stops: a stale head,
a skipped layer or another temperature would otherwise train on samples of a policy that does not exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from rlhf.packing import pack
from rlhf.policy import Policy
from rlhf.rollout.engine import (
    RolloutEngine,
    RolloutRequest,
    SamplingParams,
    SyncError,
    SyncReport,
    generate,
)
from rlhf.types import Prompt

PROBE_TOKENS = 8


class WeightSync:
    """`tolerance`: largest mean |difference| of log-probs, in nats. `prompt`: any real prompt of the run."""

    def __init__(self, policy: Policy, prompt: Prompt, *, temperature: float, tolerance: float) -> None:
        self.policy, self.temperature, self.tolerance = policy, temperature, tolerance
        self.prompt = replace(prompt, id="weight-sync-probe", columns={})

    @property
    def module(self) -> nn.Module:
        return self.policy.rollout_model

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.named_parameters()

    def push(self, engine: RolloutEngine, version: int) -> SyncReport:
        """Hands the weights over and probes them. Raises SyncError with the size of the difference."""
        self.policy.merge()
        report = engine.update_weights(self, version)
        difference = self.probe(engine)
        if not math.isfinite(difference):
            raise SyncError(
                f"after update {version} the log-probs are not finite: the weights have diverged. Go on from "
                "an earlier checkpoint with a lower learner.lr"
            )
        if difference > self.tolerance:
            raise SyncError(
                f"{type(engine).__name__} at version {version}: its log-probs differ from the learner's by "
                f"{difference:.3g} nats in the mean over {PROBE_TOKENS} tokens (rollout.sync_tolerance is "
                f"{self.tolerance:.3g}); it does not hold the weights it was given, or samples from them "
                "differently"
            )
        return report

    @torch.no_grad()
    def probe(self, engine: RolloutEngine) -> float:
        """Mean |log-prob of the engine - log-prob of the learner| on freshly decoded tokens."""
        params = SamplingParams(n=1, max_tokens=PROBE_TOKENS, seed=0, temperature=self.temperature)
        (completion,) = generate(engine, [RolloutRequest(self.prompt, params)])[0]
        device = self.policy.head.module.weight.device
        packed = pack(
            [torch.tensor(self.prompt.token_ids, device=device)],
            [[torch.tensor(completion.token_ids, device=device)]],
            [self.prompt.pictures],
        )
        logprob = self.policy.statistics(packed, temperature=self.temperature, want=("logprob",)).logprob
        assert logprob is not None
        rollout = torch.tensor(completion.rollout_logprobs, device=device)
        return (logprob - rollout).abs().mean().item()
