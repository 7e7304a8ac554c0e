"""Perception in a run: hiding patches of the pictures of a step, and what the policy says without them.

The mask of a prompt's pictures is a function of the run's seed, the step and the prompt, so nothing of it is
stored, and a resumed run draws the same. One mask a prompt and step serves its whole group, whose completions
go on sharing the prompt.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rlhf.algos.perception import Perception
from rlhf.config.perception import PerceptionConfig
from rlhf.config.run import Config
from rlhf.distributed.world import derive_seed
from rlhf.models.packing import Microbatch, Packed, microbatches
from rlhf.models.policy import Policy
from rlhf.torch_typed import integers
from rlhf.types import Experience, Images, Mask, PackedGroups, PerceptionBatch, PerceptionInputs


class MaskedPasses:
    """The passes over masked pictures that the perception term needs."""

    def __init__(
        self, policy: Policy, term: Perception, section: PerceptionConfig, *, seed: int, steps: int
    ) -> None:
        self.policy, self.term, self.section, self.seed, self.steps = policy, term, section, seed, steps

    @classmethod
    def of(cls, config: Config, policy: Policy) -> MaskedPasses | None:
        """None: the config gives no weight to perception."""
        term = config.perception.term
        if term is None:
            return None
        return cls(policy, term, config.perception, seed=config.seed, steps=config.steps)

    @torch.no_grad()
    def inputs(
        self, packed: PackedGroups, *, step: int, temperature: float, budget: int
    ) -> PerceptionInputs | None:
        """What the policy says of the same tokens before the update; None where no prompt has pictures.

        `budget`: tokens of a microbatch.
        """
        if not packed.images:
            return None
        seeing = [g for g, images in enumerate(packed.images) if images is not None]
        logprobs = torch.zeros_like(packed.rollout_logprobs)
        has_image = torch.zeros_like(packed.loss_mask)
        for micro in microbatches(packed, seeing, budget, layout=self.policy.layout):
            has_image[micro.index] = True
            if self.term.gradient == "policy":
                masked = self.masked(micro.packed, step)
                logprobs[micro.index] = self._logprobs(masked, temperature).to(logprobs.dtype)
        return PerceptionInputs(logprobs, has_image, torch.tensor(step))

    def batch(
        self, experience: Experience, micro: Microbatch, hidden: Tensor, *, temperature: float
    ) -> PerceptionBatch | None:
        """What the loss of one microbatch needs; None where none of its prompts has pictures.

        `hidden`: the policy's own states of it, with gradient.
        """
        given = experience.perception
        if given is None or not micro.packed.images:
            return None
        (step,) = integers(given.step[None])
        logprobs, exact = given.masked_logprobs[micro.index], None
        if self.term.gradient == "both":
            logprobs = self._logprobs(self.masked(micro.packed, step), temperature)
        if self.term.estimator == "exact":
            with torch.no_grad():
                blind = self.policy.hidden(self.masked(micro.packed, step))
            exact = self.policy.divergence(micro.packed, hidden, blind, temperature=temperature)
        return PerceptionBatch(logprobs, given.has_image[micro.index], exact, self.scale(step))

    def scale(self, step: int) -> float:
        """Of all three coefficients: from 1 at the first step straight to `final_share` at the last."""
        progress = step / max(1, self.steps - 1)
        return 1.0 + (self.section.final_share - 1.0) * min(1.0, progress)

    def masked(self, packed: Packed, step: int) -> Packed:
        """The same tokens after pictures with patches made black."""
        return replace(packed, images=tuple(self._mask(images, step) for images in packed.images))

    def _mask(self, images: Images | None, step: int) -> Images | None:
        if images is None:
            return None
        seed = derive_seed(self.seed, "perception", step, images.prompt_id)
        return replace(images, mask=Mask(self.section.patch, self.section.ratio, seed))

    def _logprobs(self, packed: Packed, temperature: float) -> Tensor:
        logprobs = self.policy.statistics(packed, temperature=temperature, want=("logprob",)).logprob
        assert logprobs is not None
        return logprobs
