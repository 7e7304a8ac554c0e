"""What `torchrun rlhf/train.py CONFIG` trains: a policy, or, with `task: reward_model`, a reward model."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from pydantic import ValidationError

from rlhf.config import Config, make_config
from rlhf.mistakes import explain
from rlhf.reward_model_config import RewardModelConfig
from rlhf.settings import ConfigError, read_settings

TASKS = ("rl", "reward_model")


def load_task(path: str, overrides: Sequence[str] = ()) -> Config | RewardModelConfig:
    """Raises ConfigError as `load_config` does, and for a task that is none."""
    settings = read_settings(path, overrides)
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
