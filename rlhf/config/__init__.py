"""The settings of a run, one file a YAML section; `run.py` is the tree, `load.py` reads and checks it."""

from rlhf.config.load import load_config
from rlhf.config.rollout import VLLMConfig
from rlhf.config.run import Config

__all__ = ["Config", "VLLMConfig", "load_config"]
