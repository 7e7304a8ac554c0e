"""The settings of `reward`: functions, failures, success, constraints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf.config.section import Count, Positive, Section, Share


class RewardFunction(Section):
    """One of several: `rlhf.rewards.RewardSpec` says what each setting means."""

    path: str
    weight: float = 1.0
    params: dict[str, Any] = Field(default_factory=dict)
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    weights: dict[str, float] = Field(default_factory=dict)
    timeout: Annotated[float, Field(gt=0.0)] = 10.0
    workers: Positive | None = None
    batch: Positive | Literal["group", "step"] = 1
    concurrency: Positive = 16
    cache: Count = 0
    memory_gib: Annotated[float, Field(gt=0.0)] = 4.0
    processes: Positive = 128
    gpu: bool = False


class ConstraintConfig(Section):
    """A bound on the mean of one objective, held by a multiplier on its weight (rlhf/constraints.py)."""

    objective: str
    """Whose mean over a step is bounded."""
    at_least: float | None = None
    """Its lower bound; this or `at_most`."""
    at_most: float | None = None
    """Its upper bound."""
    rate: Annotated[float, Field(gt=0.0)]
    """How far the multiplier moves after a step, for each unit that the mean is off its bound."""
    start: Annotated[float, Field(ge=0.0)] = 0.0
    """The multiplier of the first step."""

    @model_validator(mode="after")
    def has_one_bound(self) -> ConstraintConfig:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"the constraint on {self.objective} needs at_least or at_most, one of them")
        return self

    @property
    def sign(self) -> float:
        return 1.0 if self.at_most is None else -1.0

    @property
    def bound(self) -> float:
        bound = self.at_least if self.at_most is None else self.at_most
        assert bound is not None
        return bound


class RewardConfig(Section):
    functions: tuple[RewardFunction, ...] = ()
    """Their numbers, each times its `weight`, add up to the reward. Data that has its rewards needs none."""
    constraints: tuple[ConstraintConfig, ...] = ()
    """Objectives whose mean must keep to a bound."""
    max_failed_share: Share = 0.1
    """The run stops when a larger share of a step's samples got no number from any function."""
    success_objective: str | None = None
    """The objective that says whether a completion is right; the weighted sum when not given."""
    success_threshold: float = 0.5
    """A completion is right when that objective is at least this."""

    @model_validator(mode="after")
    def check_constraints(self) -> RewardConfig:
        names = [c.objective for c in self.constraints]
        if len(set(names)) != len(names):
            raise ValueError(f"reward.constraints must be of different objectives, got {', '.join(names)}")
        if names and self.success_objective is None:
            raise ValueError(
                "reward.constraints moves the weights, so the weighted sum does not say whether a completion "
                "is right: set reward.success_objective"
            )
        return self
