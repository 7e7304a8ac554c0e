"""The settings of a run, a class for each YAML section; `run.py` is the tree, `load.py` reads a file."""

from rlhf.config.load import load_config
from rlhf.config.rollout import VLLMConfig
from rlhf.config.run import Config

__all__ = ["Config", "VLLMConfig", "load_config"]
