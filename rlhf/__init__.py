"""Tandem: reinforcement learning for language models.

from rlhf import Trainer, load_config

result = Trainer(load_config("mine.yaml", ["steps=5"])).run()    # rlhf init mine.yaml writes a first config
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.config.load import load_config, load_task
    from rlhf.monitoring.result import Result
    from rlhf.reward_model.trainer import RewardModelTrainer
    from rlhf.trainer import Trainer

MODULES = {
    "Result": "rlhf.monitoring.result",
    "RewardModelTrainer": "rlhf.reward_model.trainer",
    "Trainer": "rlhf.trainer",
    "load_config": "rlhf.config.load",
    "load_task": "rlhf.config.load",
}

__all__ = ["Result", "RewardModelTrainer", "Trainer", "load_config", "load_task"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `import rlhf` alone takes no time."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)


def __dir__() -> list[str]:
    """The public names alone."""
    return __all__
