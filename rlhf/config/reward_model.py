"""`RewardModelConfig`, the settings of `task: reward_model`, and those of its sections that only it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import Field, model_validator

from rlhf.config.learner import DistributedConfig, LearnerConfig
from rlhf.config.model import ModelConfig
from rlhf.config.run import CheckpointConfig, MonitorConfig
from rlhf.config.section import Count, Positive, Section, masked


class PreferenceData(Section):
    """Examples to train and evaluate on (docs/reward_models.md)."""

    train: str
    """Examples to train on, with the columns that `score.kind` needs: a jsonl or parquet file, or a
    `datasets` folder."""
    eval: str
    """Held-out examples in the same form, on which accuracy and calibration are measured."""
    ratings: str | None = None
    """`score.kind: gated`: rated completions, with a column `ratings`, in a file or folder of their own."""
    prompt_column: str = "prompt"
    """Column of the prompts: plain text, or a list of chat messages."""
    image_column: str | None = "images"
    """Column of images that the messages themselves do not hold (docs/papo.md); a dataset may lack it."""
    max_prompt_tokens: Positive = 1024
    """Most tokens of a prompt, chat template and images included."""
    max_completion_tokens: Positive = 512
    """Most tokens of a completion, of the two together with `score.kind: gap`."""
    long_prompts: Literal["refuse", "skip"] = "refuse"
    """What happens to examples with a longer prompt or completion. `refuse`: the run does not start. `skip`:
    they are left out and counted."""


class RankingConfig(Section):
    """`score.kind: ranking`: what a sampled ranking is worth, and how many are sampled."""

    utility: str = "ndcg"
    """What a ranking is worth: `ndcg`, or a function of your own as `file.py:function`, which gets the
    relevances of the ranking's first `top` completions, best place first, and returns a number."""
    top: Positive | None = None
    """How many places of a ranking count; null: all."""
    samples: Annotated[int, Field(ge=2)] = 32
    """Rankings sampled of each prompt in an update."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Divides the scores where rankings are sampled: the higher, the more they differ when scores are far
    apart."""


class GateConfig(Section):
    """`score.kind: gated`: the network that weighs the objectives by the prompt (ArmoRM's values)."""

    width: Positive = 1024
    """Units of a hidden layer."""
    layers: Count = 3
    """Hidden layers; 0: the weights are a linear function of the state at the end of the prompt."""
    temperature: Annotated[float, Field(gt=0.0)] = 10.0
    """By which the outputs are divided before the softmax; the higher, the longer the weights stay alike."""


class ScoreConfig(Section):
    """What the scores of the reward model learn."""

    kind: Literal["pairs", "ratings", "gated", "ranking", "steps", "gap"] = "pairs"
    """`pairs`: which of two completions is better (Bradley-Terry loss). `ratings`: how good each completion
    is (squared error). `gated`: ratings of several objectives on a frozen model, weighed by the prompt so
    that they agree with pairs (ArmoRM). `ranking`: the best of several completions in front, by the policy
    gradient of a utility such as nDCG (Neural PG-RANK). `steps`: how good each step of a completion is (a
    process reward model). `gap`: by how much one completion is better than another, read together (PIT)."""
    objectives: tuple[str, ...] = ("score",)
    """Names of the scores; the model has a head for each. `pairs` has exactly one."""
    lm_coef: float | None = Field(default=None, ge=0.0)
    """Weight of a language-model loss on the better completion of each pair. Not given: 1 for `pairs`; for
    other kinds it must be 0."""
    margin_column: str | None = "margin"
    """`pairs` and `gated`: the column with the margin, in units of the score, by which the chosen completion
    is to be ahead. The data need not have one of the default name; null: there are no margins."""
    center_coef: float = Field(default=0.0, ge=0.0)
    """`pairs`: weight of (s_chosen + s_rejected)^2, which keeps the scores around 0. TRL advises 0.01."""
    verbosity: str | None = None
    """`gated`: the objective that is verbosity. Of the others so much of it is subtracted that they do not
    rise with it, and its own score is 0; null: nothing is subtracted."""
    gate: GateConfig = GateConfig()
    ranking: RankingConfig = RankingConfig()
    step_separator: Annotated[str, Field(min_length=1)] = "\n"
    """`steps`: what stands between two steps of a completion; scores are read at its last token."""

    def check(self, lm_coef: float) -> None:
        """Raises ValueError for settings that do not fit the kind; `lm_coef`: the value that holds."""
        kind, objectives = self.kind, self.objectives
        if kind in ONE_SCORE and len(objectives) != 1:
            raise ValueError(
                f"score.kind is {kind}, which has one score, but score.objectives has "
                f"{len(objectives)}: {', '.join(objectives)}"
            )
        if not objectives or len(set(objectives)) != len(objectives):
            raise ValueError(f"score.objectives must be different names, got {list(objectives)}")
        if kind == "gated" and (len(objectives) < 2 or "score" in objectives):
            raise ValueError(
                "score.kind is gated, which weighs several objectives: score.objectives must name two or "
                f"more, none of them `score`, the name of their sum; got {', '.join(objectives)}"
            )
        if kind != "pairs" and lm_coef:
            raise ValueError(
                "score.lm_coef weighs a loss on the better completion of a pair, which score.kind = "
                f"{kind} does not have: it must be 0, got {lm_coef:g}"
            )
        if self.verbosity is not None and self.verbosity not in objectives:
            raise ValueError(
                f"score.verbosity is {self.verbosity!r}, which is not one of score.objectives: "
                f"{', '.join(objectives)}"
            )
        for name, kinds in OF_KINDS.items():
            default = type(self).model_fields[name].default
            if kind not in kinds and getattr(self, name) != default:
                raise ValueError(
                    f"score.{name} is a setting of score.kind = {' or '.join(kinds)}, but the kind is "
                    f"{kind}: leave it out"
                )


GATE_LR = 1e-3
"""Learning rate of a gate: ArmoRM's."""
ONE_SCORE = ("pairs", "ranking", "steps", "gap")
"""Kinds with exactly one score."""
OF_KINDS = {
    "margin_column": ("pairs", "gated"),
    "center_coef": ("pairs",),
    "verbosity": ("gated",),
    "gate": ("gated",),
    "ranking": ("ranking",),
    "step_separator": ("steps",),
}
"""Settings of `score` that only some kinds have."""


class BatchConfig(Section):
    """How many examples one update learns from."""

    tokens: Positive
    """Tokens of an update: it takes examples until they have this many."""
    low: Positive = 4
    """Fewest examples of an update, whatever their tokens."""
    high: Positive = 128
    """Most examples of an update."""


class ScoreLearnerConfig(LearnerConfig):
    """The optimizer (AdamW). A `warmup_steps` that is not given is a tenth of `steps`."""

    lr: Annotated[float, Field(gt=0.0)] = 5e-6
    """Learning rate of AdamW, after the warm-up. Not given with `score.kind: gated`: 1e-3."""
    epochs: Positive = 1
    """1 is the only value: a reward model makes one update of each batch."""
    minibatches: Positive = 1
    """1 is the only value, as for `epochs`."""


class HeldOutConfig(Section):
    """Evaluations on the held-out examples of `data.eval`."""

    every: Count = 0
    """Steps between evaluations; 0: only before the first step and after the last one."""


class RewardModelConfig(Section):
    """The settings of a run that trains a reward model."""

    task: Literal["reward_model"]
    """What is trained: a reward model. `rl`, the default, trains a policy with the settings above."""
    run_dir: str
    """Folder that the run writes to; with `checkpoint.resume: auto` that of an earlier run, which
    continues."""
    steps: Positive = 1000
    """Number of updates."""
    seed: Count = 0
    """Seed of all random numbers."""
    model: ModelConfig
    data: PreferenceData
    score: ScoreConfig = ScoreConfig()
    batch: BatchConfig
    learner: ScoreLearnerConfig = ScoreLearnerConfig()
    distributed: DistributedConfig = DistributedConfig()
    eval: HeldOutConfig = HeldOutConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()

    @property
    def lm_coef(self) -> float:
        """`score.lm_coef`, or its default for the kind of examples."""
        if self.score.lm_coef is not None:
            return self.score.lm_coef
        return 1.0 if self.score.kind == "pairs" else 0.0

    @model_validator(mode="before")
    @classmethod
    def fill_in_the_schedule(cls, given: Any) -> Any:
        """Fills in `learner.warmup_steps`, and `learner.lr` of a gate, where they are not given."""
        if not isinstance(given, Mapping):
            return given
        settings: dict[str, Any] = {**cast(Mapping[str, Any], given)}
        steps: Any = settings.get("steps", cls.model_fields["steps"].default)
        learner: Any = settings.get("learner", {})
        if isinstance(steps, int) and isinstance(learner, Mapping):
            filled: dict[str, Any] = {"warmup_steps": max(steps, 0) // 10}
            score: Any = settings.get("score", {})
            if isinstance(score, Mapping) and cast(Mapping[str, Any], score).get("kind") == "gated":
                filled["lr"] = GATE_LR
            settings["learner"] = {**filled, **cast(Mapping[str, Any], learner)}
        return settings

    @model_validator(mode="after")
    def check_together(self) -> RewardModelConfig:
        self.score.check(self.lm_coef)
        if (self.data.ratings is None) == (self.score.kind == "gated"):
            raise ValueError(
                "data.ratings has the rated completions that score.kind = gated learns from: "
                + ("give it" if self.data.ratings is None else f"the kind is {self.score.kind}, leave it out")
            )
        learner, batch = self.learner, self.batch
        if batch.low > batch.high:
            raise ValueError(f"batch.low must be at most batch.high = {batch.high}, got {batch.low}")
        if learner.epochs * learner.minibatches != 1:
            raise ValueError(
                "learner.epochs and learner.minibatches must be 1, because a reward model makes one update "
                f"of each batch; got {learner.epochs} and {learner.minibatches}"
            )
        if learner.warmup_steps > self.steps:
            raise ValueError(
                f"learner.warmup_steps is {learner.warmup_steps}, but the run has {self.steps} steps"
            )
        if self.model.lora is not None:
            raise ValueError("model.lora must not be given: a reward model is trained without an adapter")
        return self

    def to_yaml(self) -> str:
        """The text of RUN/config.yaml: every setting with the value that holds, defaults included."""
        return yaml.safe_dump(masked(self.model_dump(mode="json")), sort_keys=False, width=110)
