"""Tandem: reinforcement learning for language models.

from rlhf import Trainer, load_config

Trainer(load_config("configs/quickstart.yaml", ["steps=5"])).run()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.config import load_config
    from rlhf.trainer import Trainer

__all__ = ["Trainer", "load_config"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: `import rlhf` alone takes no time."""
    match name:
        case "Trainer":
            from rlhf.trainer import Trainer

            return Trainer
        case "load_config":
            from rlhf.config import load_config

            return load_config
        case _:
            raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
