"""The settings of a run: one frozen tree of sections.

Checks within one section stand in its class, checks between sections in `checks.py`; `load.py` reads a file,
resolves the algorithm and calls them. The keys of `algorithm` are the keyword arguments of its function in
`algos/table.py`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import field_validator, model_validator

from rlhf.algos.algorithm import Algorithm
from rlhf.algos.table import ALGORITHMS
from rlhf.config.algorithm import algorithm_factory
from rlhf.config.data import DataConfig, PromptValueConfig, ReplayConfig
from rlhf.config.learner import CriticConfig, DistributedConfig, LearnerConfig, PtxConfig
from rlhf.config.model import ModelConfig
from rlhf.config.perception import PerceptionConfig
from rlhf.config.reward import RewardConfig
from rlhf.config.rollout import BudgetConfig, RolloutConfig
from rlhf.config.section import Count, Positive, Section


class EvalConfig(Section):
    every: Count = 0
    """Steps between evaluations; 0: before the first step and after the last one only."""
    samples: Positive = 8
    """Completions of each held-out prompt."""
    max_prompts: Positive | None = None
    """Only the first so many held-out prompts; not given: all."""


class CheckpointConfig(Section):
    every: Count = 50
    """Steps between checkpoints; 0: only at the end and when interrupted."""
    keep_last: Positive = 2
    """How many of the newest checkpoints stay."""
    keep_best: Count = 0
    """Beside the last ones, those of the steps whose evaluation was the most accurate."""
    background: bool | None = None
    """Write while the next step is computed, from a copy on the host; not given: on a GPU."""
    resume: Literal["never", "auto"] = "never"
    """`auto` goes on from the newest whole checkpoint in `run_dir`, or begins where there is none."""
    export: bool = True
    """Write the final model in the Hugging Face layout."""


class MonitorConfig(Section):
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Beside RUN/metrics.jsonl, which is always written."""
    samples_per_step: Count = 2
    """Groups whose completions go to RUN/samples.jsonl."""


class Config(Section):
    task: Literal["rl"] = "rl"
    """What is trained: a policy, or with `reward_model` that (rlhf/reward_model_config.py)."""
    run_dir: str
    """Folder of the run, new or with `checkpoint.resume: auto` an earlier one."""
    steps: Positive
    """Rounds of rollouts and updates."""
    seed: Count = 0
    """Of everything drawn at random."""
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    algorithm: dict[str, Any]
    """`name` (a key of `ALGORITHMS`, or `path/file.py:function`) and that function's keyword
    arguments; or the name alone."""
    rollout: RolloutConfig = RolloutConfig()
    budget: BudgetConfig = BudgetConfig()
    prompt_value: PromptValueConfig = PromptValueConfig()
    replay: ReplayConfig = ReplayConfig()
    learner: LearnerConfig = LearnerConfig()
    critic: CriticConfig = CriticConfig()
    perception: PerceptionConfig = PerceptionConfig()
    distributed: DistributedConfig = DistributedConfig()
    ptx: PtxConfig = PtxConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="before")
    @classmethod
    def gym_brings_its_reward(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        settings: dict[str, Any] = {**typing.cast(Mapping[str, Any], given)}
        data: Any = settings.get("data")
        if isinstance(data, Mapping) and str(typing.cast(Any, data).get("train")).startswith("gym:"):
            settings.setdefault("reward", {"functions": [{"path": "gym"}]})
        return settings

    @field_validator("algorithm", mode="before")
    @classmethod
    def may_be_a_name_alone(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @field_validator("algorithm")
    @classmethod
    def has_a_name(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(settings.get("name"), str):
            raise ValueError(f"needs a name, one of {', '.join(ALGORITHMS)} or path/file.py:function")
        return settings

    def build_algorithm(self) -> Algorithm:
        settings = dict(self.algorithm)
        algorithm = algorithm_factory(settings.pop("name"))(**settings)
        return dataclasses.replace(algorithm, perception=self.perception.term)

    def to_yaml(self) -> str:
        """Every setting with the value in force, as RUN/config.yaml holds it."""
        plain = {key: _plain(value) for key, value in self.model_dump(mode="json").items()}
        return yaml.safe_dump(plain, sort_keys=False, width=110)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in typing.cast(dict[str, Any], value).items()}
    return value
