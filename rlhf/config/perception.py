"""The section `perception`: a loss that rewards using a prompt's images (PAPO), and its early warnings."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.algos.perception import Perception
from rlhf.config.section import Positive, Section, Share

NonNegative = Annotated[float, Field(ge=0.0)]


class PerceptionConfig(Section):
    """A loss for prompts with images (PAPO; docs/papo.md): it rewards that the policy answers otherwise when
    squares of the images are made black. Off while the three coefficients are 0."""

    coef: NonNegative = 0.0
    """Weight of KL(policy || policy given the images with squares made black), which is maximised."""
    entropy_coef: NonNegative = 0.0
    """Weight of the policy's entropy, which is minimised; together with `masked_entropy_coef` this is the
    paper's double entropy loss."""
    masked_entropy_coef: NonNegative = 0.0
    """Weight of the policy's entropy given the masked images, which is minimised. With `gradient: policy` it
    has no gradient, and so no effect."""
    estimator: Literal["k3", "exact"] = "k3"
    """How the KL is computed. `k3`: estimated from the sampled tokens. `exact`: over the whole vocabulary,
    with less noise and another pass of the model in every update."""
    gradient: Literal["policy", "both"] = "policy"
    """Through which passes the loss has a gradient. `policy`: log-probs given the masked images are computed
    once, before the update, and are constants. `both`: they are computed in every pass with gradient, at
    about twice the cost."""
    max_kl: Annotated[float, Field(gt=0.0)] | None = None
    """Largest KL of one token that counts, in nats; not given: no bound."""
    final_share: Share = 1.0
    """Share of the three coefficients that is left at the last step; they change linearly from the first step
    on. 1: they stay."""
    patch: Positive = 14
    """Side of the squares of a mask, in pixels of the image in the size that the model gets it."""
    ratio: Share = 0.6
    """Probability that a square is made black."""
    watch_steps: Positive = 5
    """Steps over which the metrics are averaged that show whether the KL is hacked, which means that it grows
    although the images are used no better (rlhf/learn/perception/watch.py)."""
    stop_at_signs: Annotated[int, Field(ge=1, le=5)] | None = None
    """The run ends when so many of the five signs of a hacked KL show at once; not given: it goes on, with a
    warning from two on."""

    @property
    def term(self) -> Perception | None:
        """The term of the loss; None while all its coefficients are 0."""
        if not (self.coef or self.entropy_coef or self.masked_entropy_coef):
            return None
        return Perception(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(Perception)}
        )

    @model_validator(mode="after")
    def has_something_to_hide(self) -> PerceptionConfig:
        if self.coef and not self.ratio:
            raise ValueError(
                "perception.ratio is 0: nothing is hidden, so the perception KL is always 0; set it above 0, "
                "or perception.coef to 0"
            )
        if self.estimator == "exact" and self.gradient == "both":
            raise ValueError(
                "perception.estimator = exact has no gradient into the masked pass, which is what "
                "perception.gradient = both asks for: set perception.gradient to policy"
            )
        return self
