"""The settings of a run, a class for each YAML section; `run.py` is the tree, `load.py` reads a file.

Imported when they are asked for: a worker process that needs a part of a section does not load PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.config.load import load_config
    from rlhf.config.rollout import VLLMConfig
    from rlhf.config.run import Config

MODULE_OF = {
    "Config": "rlhf.config.run",
    "VLLMConfig": "rlhf.config.rollout",
    "load_config": "rlhf.config.load",
}

__all__ = ["Config", "VLLMConfig", "load_config"]


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULE_OF[name]), name)
