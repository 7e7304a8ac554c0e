"""The policy's passes over images with patches made black, for the perception terms of the loss (PAPO).

The mask of a prompt's images is a function of the run's seed, the step and the prompt, so nothing of it is
stored, and a resumed run draws the same. In one step a prompt has one mask for its whole group, so that the
completions still share the prompt. Images of observations are no part of it: they are never masked.
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
    """The passes over masked images that the perception terms need."""

    def __init__(
        self, policy: Policy, term: Perception, section: PerceptionConfig, *, seed: int, steps: int
    ) -> None:
        self.policy, self.term, self.section, self.seed, self.steps = policy, term, section, seed, steps

    @classmethod
    def of(cls, config: Config, policy: Policy) -> MaskedPasses | None:
        """The passes of a run; None where the config gives no weight to perception."""
        term = config.perception.term
        if term is None:
            return None
        return cls(policy, term, config.perception, seed=config.seed, steps=config.steps)

    @torch.no_grad()
    def inputs(
        self, packed: PackedGroups, *, step: int, temperature: float, budget: int
    ) -> PerceptionInputs | None:
        """Log-probs of the same tokens given the masked images; None where no prompt has images.

        They are computed before the update, and only where the terms do not need them with gradient.
        `budget`: tokens of a microbatch.
        """
        if not packed.images:
            return None
        with_images = [g for g, images in enumerate(packed.images) if images is not None]
        logprobs = torch.zeros_like(packed.rollout_logprobs)
        has_image = torch.zeros_like(packed.loss_mask)
        for micro in microbatches(packed, with_images, budget, layout=self.policy.layout):
            has_image[micro.index] = True
            if self.term.gradient == "policy":
                masked = self.masked(micro.packed, step)
                logprobs[micro.index] = self._logprobs(masked, temperature).to(logprobs.dtype)
        return PerceptionInputs(logprobs, has_image, torch.tensor(step))

    def batch(
        self, experience: Experience, micro: Microbatch, hidden: Tensor, *, temperature: float
    ) -> PerceptionBatch | None:
        """What the loss of one microbatch needs; None where none of its prompts has images.

        `hidden` `[N, H]`: the policy's hidden states given the images as they are, with gradient.
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
                masked_hidden = self.policy.hidden(self.masked(micro.packed, step))
            exact = self.policy.divergence(micro.packed, hidden, masked_hidden, temperature=temperature)
        return PerceptionBatch(logprobs, given.has_image[micro.index], exact, self.scale(step))

    def scale(self, step: int) -> float:
        """Factor of all three coefficients: linear from 1 at the first step to `final_share` at the last."""
        progress = step / max(1, self.steps - 1)
        return 1.0 + (self.section.final_share - 1.0) * min(1.0, progress)

    def masked(self, packed: Packed, step: int) -> Packed:
        """The same tokens, with patches of their prompts' images made black."""
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
