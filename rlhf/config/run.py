"""`Config`, the settings of a run that trains a policy, and the sections `eval`, `checkpoint` and `monitor`.

Checks within one section are methods of its class, checks between sections are in `checks/`; `load.py`
reads a file, fills in the defaults of the algorithm and calls them. The keys of `algorithm` are the keyword
arguments of its function in `algos/table.py`.
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
from rlhf.config.algorithm import make_algorithm
from rlhf.config.data import DataConfig, PromptValueConfig, ReplayConfig
from rlhf.config.environment import EnvironmentConfig
from rlhf.config.learner import (
    CriticConfig,
    DistributedConfig,
    IterationConfig,
    LearnerConfig,
    PtxConfig,
)
from rlhf.config.model import ModelConfig
from rlhf.config.pairs import PairsConfig
from rlhf.config.perception import PerceptionConfig
from rlhf.config.reward import RewardConfig
from rlhf.config.rollout import BudgetConfig, RolloutConfig
from rlhf.config.schedule import schedules
from rlhf.config.section import Count, Positive, Section, masked
from rlhf.config.tree import TreeConfig

AROUND = 32
"""More tokens than a chat template writes around a message."""


class EvalConfig(Section):
    """Evaluations on the held-out prompts of `data.eval`."""

    every: Count = 0
    """Steps between evaluations; 0: only before the first step and after the last one."""
    samples: Positive = 8
    """Completions that are sampled for each held-out prompt."""
    max_prompts: Positive | None = None
    """Number of held-out prompts that are used, from the first one on; not given: all."""


class CheckpointConfig(Section):
    """When a run is saved, which checkpoints stay, and whether it continues from one."""

    every: Count = 50
    """Steps between checkpoints; 0: only at the end of the run and when it is interrupted."""
    keep_last: Positive = 2
    """Number of the newest checkpoints that are kept."""
    keep_best: Count = 0
    """Number of checkpoints that are kept in addition: those with the best evaluation, by accuracy, mean
    reward or accuracy of held-out pairs, whichever the run shows."""
    background: bool | None = None
    """Whether a checkpoint is written while the next step is computed, from a copy in the host's memory; not
    given: with a GPU it is, on a CPU it is not."""
    resume: Literal["never", "auto"] = "never"
    """`never`: a run that is already in `run_dir` is an error. `auto`: it continues from its newest complete
    checkpoint, and where there is none the run starts at its first step."""
    export: bool = True
    """Whether the final model is written to RUN/model, in the Hugging Face layout."""

    @field_validator("resume", mode="before")
    @classmethod
    def may_be_yes_or_no(cls, given: Any) -> Any:
        return {True: "auto", False: "never"}[given] if isinstance(given, bool) else given


class MonitorConfig(Section):
    """Where metrics are shown, and how many completions are recorded."""

    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics are written in addition to RUN/metrics.jsonl."""
    samples_per_step: Count = 2
    """Groups of each step whose completions are written to RUN/samples.jsonl."""
    project: str | None = None
    """Project of the run in W&B and trackio; not given: WANDB_PROJECT for W&B, else the name of the folder
    that `run_dir` is in."""
    name: str | None = None
    """Name of the run in W&B and trackio; not given: WANDB_NAME for W&B, else the name of `run_dir`."""


class Config(Section):
    """The settings of a run that trains a policy."""

    task: Literal["rl"] = "rl"
    """What is trained. `rl`: a policy. `reward_model`: a reward model, with the settings at the end of
    docs/settings.md."""
    run_dir: str
    """Folder that the run writes to; with `checkpoint.resume: auto` that of an earlier run, which
    continues."""
    steps: Positive
    """Number of steps: each collects completions and makes one or more updates."""
    seed: Count = 0
    """Seed of all random numbers."""
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    algorithm: dict[str, Any]
    """`name` (a key of `ALGORITHMS`, or `path/file.py:function`) and keyword arguments of that function; or
    the name alone."""
    environment: EnvironmentConfig = EnvironmentConfig()
    pairs: PairsConfig = PairsConfig()
    iteration: IterationConfig = IterationConfig()
    rollout: RolloutConfig = RolloutConfig()
    budget: BudgetConfig = BudgetConfig()
    prompt_value: PromptValueConfig = PromptValueConfig()
    replay: ReplayConfig = ReplayConfig()
    learner: LearnerConfig = LearnerConfig()
    critic: CriticConfig = CriticConfig()
    perception: PerceptionConfig = PerceptionConfig()
    distributed: DistributedConfig = DistributedConfig()
    ptx: PtxConfig = PtxConfig()
    tree: TreeConfig = TreeConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="before")
    @classmethod
    def gym_brings_its_reward(cls, given: Any) -> Any:
        """A `gym:` dataset without a section `reward` is scored by the built-in reward `gym`."""
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
        """Capitals and dashes do not matter: Dr-GRPO is dr_grpo."""
        settings: Any = {"name": given} if isinstance(given, str) else given
        if not isinstance(settings, dict):
            return settings
        named = typing.cast(dict[str, Any], settings)
        name = str(named.get("name")).lower().replace("-", "_")
        return named | {"name": name} if name in ALGORITHMS else named

    @field_validator("algorithm")
    @classmethod
    def has_a_name(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(settings.get("name"), str):
            raise ValueError(f"needs a name, one of {', '.join(ALGORITHMS)} or path/file.py:function")
        return settings

    @property
    def longest(self) -> int:
        """The most tokens that a prompt and all that follows it have."""
        longest, improve = self.data.max_prompt_tokens, self.data.improve_prompt
        # with a column of answers to improve, prompts have answer and request in them
        if improve is not None and self.data.improve_column is None:
            # a first answer, and no more tokens than characters, those of a chat template among them
            longest += self.rollout.max_completion_tokens + len(improve) + AROUND
        return longest + self.rollout.max_completion_tokens

    def build_algorithm(self, step: int | None = None) -> Algorithm:
        """The algorithm of the section `algorithm`, with the loss of the section `perception`.

        `step`: the step, from 0, whose value it has of each number that follows the run. None: the largest
        value of each, so that whatever the algorithm needs at any time is there.
        """
        progress = None if step is None else self._progress(step)
        algorithm = make_algorithm(self.algorithm, progress)
        return dataclasses.replace(algorithm, perception=self.perception.term)

    def numbers_in_force(self, step: int) -> dict[str, float]:
        """The numbers of the algorithm that follow the run, by dotted key, as they are at `step` (from 0)."""
        return {key: s.at(self._progress(step)) for key, s in schedules(self.algorithm)}

    @property
    def beta(self) -> float | None:
        """The algorithm's beta, at the last step where it follows the run; None where it has none."""
        return self.numbers_in_force(self.steps - 1).get("beta", self.algorithm.get("beta"))

    def _progress(self, step: int) -> float:
        return min(step / max(self.steps - 1, 1), 1.0)

    def to_dict(self) -> dict[str, Any]:
        """The plain tree of all settings, defaults included, as a config file has it."""
        return {key: _plain(value) for key, value in self.model_dump(mode="json").items()}

    def to_yaml(self) -> str:
        """The text of RUN/config.yaml: every setting with the value that holds, defaults included; secrets
        masked."""
        return yaml.safe_dump(masked(self.to_dict()), sort_keys=False, width=110)


def _plain(value: Any) -> Any:
    """Dataclasses, at any depth of dicts, as dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in typing.cast(dict[str, Any], value).items()}
    return value
