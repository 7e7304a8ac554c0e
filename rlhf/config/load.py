"""Loads and checks the settings of a run: YAML and overrides -> `Config` or `RewardModelConfig`.

config = load_config("mine.yaml", ["steps=40", "rollout.group_size=16"])
config = load_config({"run_dir": "runs/own", "steps": 40, "model": {"path": ...}, ...})
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from rlhf.config.algorithm import arguments_of, resolve_algorithm
from rlhf.config.checks.run import check_config
from rlhf.config.errors import explain
from rlhf.config.overrides import read_settings
from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.run import Config
from rlhf.config.section import ConfigError

TASKS = ("rl", "reward_model")


def load_task(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> Config | RewardModelConfig:
    """The settings of a run of either task: one that trains a policy (`rl`) or a reward model.

    Raises ConfigError as `load_config` does, and for an unknown task.
    """
    settings = read_settings(source, overrides)
    task = settings.get("task", "rl")
    if task not in TASKS:
        near = difflib.get_close_matches(str(task), TASKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"task must be {' or '.join(TASKS)}, got {task!r}{hint}")
    if task == "rl":
        return make_config(settings)
    try:
        return RewardModelConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, prefix="", schema=RewardModelConfig))) from None


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The settings of a run that trains a policy, from a YAML file, or a dict of its form, and
    `dotted.key=value` overrides.

    Raises ConfigError: the file is missing or is no YAML mapping, an override is malformed, a key is unknown
    (the nearest one is suggested), a value is out of its range, or two settings do not work together.
    """
    return make_config(read_settings(source, overrides))


def make_config(settings: Mapping[str, Any]) -> Config:
    """A checked Config from a nested mapping, with every default of its algorithm. Raises ConfigError."""
    if settings.get("task") == "reward_model":
        raise ConfigError(
            "task must be rl here, which trains a policy, got reward_model: rlhf train CONFIG trains it, or "
            "from Python rlhf.RewardModelTrainer(rlhf.load_task(CONFIG)).run()"
        )
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        algorithm: Any = settings.get("algorithm")
        name = cast(Mapping[str, Any], algorithm).get("name") if isinstance(algorithm, Mapping) else algorithm
        lines = explain(error, prefix="", schema=Config, arguments=arguments_of(name))
        raise ConfigError("\n".join(lines)) from None
    try:
        algorithm = resolve_algorithm(config.algorithm, max_tokens=config.rollout.max_completion_tokens)
        config = config.model_copy(update={"algorithm": algorithm})
        check_config(config, config.build_algorithm())
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return config
