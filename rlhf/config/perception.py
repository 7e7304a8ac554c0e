"""The settings of perception: what looking at the pictures of a prompt is worth, and when that is hacked."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.algos.perception import Perception
from rlhf.config.section import Positive, Section, Share

NonNegative = Annotated[float, Field(ge=0.0)]


class PerceptionConfig(Section):
    """For prompts with pictures (algos/perception.py, docs/papo.md)."""

    coef: NonNegative = 0.0
    """Of KL(policy || policy that sees the pictures with patches made black), which is maximised."""
    entropy_coef: NonNegative = 0.0
    """Of the policy's entropy, which is kept low; with the next one the paper's double entropy loss."""
    masked_entropy_coef: NonNegative = 0.0
    """Of the entropy without the patches; it has no gradient, and so no effect, if `gradient` is policy."""
    estimator: Literal["k3", "exact"] = "k3"
    """From the sampled tokens, or of the whole vocabulary."""
    gradient: Literal["policy", "both"] = "policy"
    """`both`: masked log-probs of now, with gradient, for a second forward and backward pass."""
    max_kl: Annotated[float, Field(gt=0.0)] | None = None
    """Bound of a token's KL."""
    final_share: Share = 1.0
    """Of the three coefficients at the last step; they go there in a straight line."""
    patch: Positive = 14
    """Side of a square that is hidden or not, in pixels of the picture as the model sees it."""
    ratio: Share = 0.6
    """Probability that a square is hidden."""
    watch_steps: Positive = 5
    """Steps over which the signs of a hacked KL are averaged (rlhf/hacking.py)."""
    stop_at_signs: Annotated[int, Field(ge=1, le=5)] | None = None
    """The run ends when so many of the five signs show at once; not given: a warning, and it goes on."""

    @property
    def term(self) -> Perception | None:
        """None: perception has no weight."""
        if not (self.coef or self.entropy_coef or self.masked_entropy_coef):
            return None
        return Perception(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(Perception)}
        )

    @model_validator(mode="after")
    def has_something_to_hide(self) -> PerceptionConfig:
        if self.coef and not self.ratio:
            raise ValueError("perception.ratio is 0: nothing is hidden, so looking makes no difference")
        if self.estimator == "exact" and self.gradient == "both":
            raise ValueError(
                "perception.estimator exact has no gradient into the masked pass: set perception.gradient to "
                "policy"
            )
        return self
