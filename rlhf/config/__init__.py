"""The settings of a run: a class for each section of the YAML file. `run.py` has the tree, `load.py` reads
it."""

from rlhf.config.load import load_config
from rlhf.config.rollout import VLLMConfig
from rlhf.config.run import Config

__all__ = ["Config", "VLLMConfig", "load_config"]
