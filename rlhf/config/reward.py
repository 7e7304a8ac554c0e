"""The section `reward`: reward functions, constraints on objectives, and when a completion is correct."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf.config.section import Count, Positive, Section, Share


class Function(Section):
    """One function that runs in workers: a reward function or a judge."""

    # RewardSpec in rlhf/rewards/plugin.py has the same fields and says what they mean
    path: str
    params: dict[str, Any] = Field(default_factory=dict)
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    timeout: Annotated[float, Field(gt=0.0)] = 10.0
    workers: Positive | None = None
    batch: Positive | Literal["group", "step"] = 1
    concurrency: Positive = 16
    cache: Count = 0
    memory_gib: Annotated[float, Field(gt=0.0)] = 4.0
    processes: Positive = 128
    gpu: bool = False
    variables: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def may_be_a_path_alone(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given


class RewardFunction(Function):
    """One reward function."""

    weight: float = 1.0
    weights: dict[str, float] = Field(default_factory=dict)


class JudgeConfig(Function):
    """A judge that compares completions of a prompt two by two: a function `judge(prompts, completions)` that
    gets two completions for each prompt, or one that is built in. A sample is one comparison."""

    both_orders: bool = True
    """Whether each duel is judged twice, each completion once in the first place:
    p = (P(a, b) + 1 - P(b, a)) / 2. It takes the judge's bias for a place out, at twice the calls."""


class ConstraintConfig(Section):
    """A bound on the mean of one objective over a step. A multiplier is added to the objective's weight; it
    grows while the bound is missed and shrinks while it holds (rlhf/rewards/constraints.py)."""

    objective: str
    """Name of the objective whose mean is bounded."""
    at_least: float | None = None
    """Lower bound of the mean. Give either this or `at_most`."""
    at_most: float | None = None
    """Upper bound of the mean."""
    rate: Annotated[float, Field(gt=0.0)]
    """How far the multiplier moves after a step, for each unit between the mean and the bound. It depends on
    the scale of the objective, so there is no default."""
    start: Annotated[float, Field(ge=0.0)] = 0.0
    """The multiplier of the first step."""

    @model_validator(mode="after")
    def has_one_bound(self) -> ConstraintConfig:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"the constraint on {self.objective} needs at_least or at_most, one of them")
        return self

    @property
    def sign(self) -> float:
        """1 for a lower bound, -1 for an upper one."""
        return 1.0 if self.at_most is None else -1.0

    @property
    def bound(self) -> float:
        """The one bound that is given."""
        bound = self.at_least if self.at_most is None else self.at_most
        assert bound is not None
        return bound


class RewardConfig(Section):
    """The reward functions, the share of samples they may fail on, and when a completion is correct."""

    functions: tuple[RewardFunction, ...] = ()
    """The reward functions: their scores, each times its `weight`, add up to the reward. It may be empty with
    a judge in `preference`, and with `data.mode: offline` where the dataset has rewards."""
    preference: JudgeConfig | None = None
    """The judge of sampled completions; not given: none. Without reward functions the reward of a completion
    is its mean win rate against the others of its prompt; beside them the judge only gives labels to
    pairs."""
    constraints: tuple[ConstraintConfig, ...] = ()
    """Bounds on the means of single objectives; they move the objectives' weights."""
    max_failed_share: Share = 0.1
    """Largest share of a step's samples that may be without a reward because a function failed on them;
    beyond it the run stops with an error that names the function. The same share of a step's comparisons may
    be without a verdict of the judge."""
    special_tokens: Literal["drop", "keep"] = "drop"
    """What reward functions read of special tokens in a completion. `drop`: nothing, as in TRL and verl.
    `keep`: all but those that begin, end or pad a sequence; for models whose tags, `<think>` for example, are
    special tokens."""
    success_objective: str | None = None
    """Objective that says whether a completion is correct, by its name; not given: the weighted sum."""
    success_threshold: float = 0.5
    """A completion is correct when that objective is at least this."""

    @model_validator(mode="after")
    def check_constraints(self) -> RewardConfig:
        names = [c.objective for c in self.constraints]
        if len(set(names)) != len(names):
            raise ValueError(f"reward.constraints must be of different objectives, got {', '.join(names)}")
        if names and self.success_objective is None:
            raise ValueError(
                "reward.constraints moves the weights, so the weighted sum does not say whether a completion "
                "is correct: set reward.success_objective"
            )
        return self
