"""The settings of `task: reward_model`, from the same kind of YAML and overrides as those of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import Field, model_validator

from rlhf.config.learner import LearnerConfig
from rlhf.config.model import ModelConfig
from rlhf.config.run import CheckpointConfig, MonitorConfig
from rlhf.config.section import Count, Positive, Section


class PreferenceData(Section):
    train: str
    """jsonl or parquet file, or a `datasets` folder, of pairs or ratings."""
    eval: str
    """Held out: accuracy and calibration are measured here."""
    prompt_column: str = "prompt"
    """Holds plain text, or a list of chat messages."""
    max_prompt_tokens: Positive = 1024
    """Longest prompt that is taken, chat template included."""
    max_completion_tokens: Positive = 512
    """Longest completion that is taken."""
    long_prompts: Literal["refuse", "skip"] = "refuse"
    """What to do with longer examples: refuse the run, or leave them out and count them."""


class ScoreConfig(Section):
    kind: Literal["pairs", "ratings"] = "pairs"
    """Which of two completions is better (Bradley-Terry), or how good each is (regression)."""
    objectives: tuple[str, ...] = ("score",)
    """Names of the scores, one head each. Pairs have one."""
    lm_coef: float | None = Field(default=None, ge=0.0)
    """Of the language-model loss on chosen completions. Not given: 1 for pairs, 0 for ratings."""


class BatchConfig(Section):
    tokens: Positive
    """An update takes examples until they have this many tokens."""
    low: Positive = 4
    """Fewest examples of an update, whatever their tokens."""
    high: Positive = 128
    """Most examples of an update."""


class ScoreLearnerConfig(LearnerConfig):
    lr: Annotated[float, Field(gt=0.0)] = 5e-6


class HeldOutConfig(Section):
    every: Count = 0
    """Steps between evaluations; 0: before the first step and after the last one only."""


class RewardModelConfig(Section):
    task: Literal["reward_model"]
    """`rl` trains a policy, `reward_model` this."""
    run_dir: str
    """Folder of the run."""
    steps: Positive = 1000
    """Updates."""
    seed: Count = 0
    """Of everything drawn at random."""
    model: ModelConfig
    data: PreferenceData
    score: ScoreConfig = ScoreConfig()
    batch: BatchConfig
    learner: ScoreLearnerConfig = ScoreLearnerConfig()
    """A warm-up that is not given is a tenth of the steps."""
    eval: HeldOutConfig = HeldOutConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()

    @property
    def lm_coef(self) -> float:
        if self.score.lm_coef is not None:
            return self.score.lm_coef
        return 1.0 if self.score.kind == "pairs" else 0.0

    @model_validator(mode="before")
    @classmethod
    def warm_up_for_a_tenth_of_the_steps(cls, given: Any) -> Any:
        """Fills in `learner.warmup_steps` where it is not given."""
        if not isinstance(given, Mapping):
            return given
        settings: dict[str, Any] = {**cast(Mapping[str, Any], given)}
        steps: Any = settings.get("steps", cls.model_fields["steps"].default)
        learner: Any = settings.get("learner", {})
        if isinstance(steps, int) and isinstance(learner, Mapping):
            settings["learner"] = {"warmup_steps": max(steps, 0) // 10, **cast(Mapping[str, Any], learner)}
        return settings

    @model_validator(mode="after")
    def check_together(self) -> RewardModelConfig:
        score, learner, batch = self.score, self.learner, self.batch
        if score.kind == "pairs" and len(score.objectives) != 1:
            raise ValueError(f"score.kind pairs has one score, got objectives {', '.join(score.objectives)}")
        if not score.objectives or len(set(score.objectives)) != len(score.objectives):
            raise ValueError(f"score.objectives must be different names, got {list(score.objectives)}")
        if score.kind == "ratings" and self.lm_coef:
            raise ValueError(
                "score.lm_coef is the weight of the likelihood of chosen completions; ratings choose none, "
                f"so it must be 0, got {self.lm_coef:g}"
            )
        if batch.low > batch.high:
            raise ValueError(f"batch.low is {batch.low}, more than batch.high = {batch.high}")
        if learner.epochs * learner.minibatches != 1:
            raise ValueError(
                "learner.epochs and learner.minibatches are those of rollouts; a reward model makes one "
                f"update of each batch, got {learner.epochs} and {learner.minibatches}"
            )
        if learner.warmup_steps > self.steps:
            raise ValueError(
                f"learner.warmup_steps is {learner.warmup_steps}, but the run has {self.steps} steps"
            )
        if self.model.lora is not None:
            raise ValueError("model.lora: a reward model is trained whole")
        return self

    def to_yaml(self) -> str:
        """Every setting with the value in force, as RUN/config.yaml holds it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110)
