"""What can be known of a run with vLLM before weights are loaded."""

from __future__ import annotations

import importlib.util
import os

from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.devices import visible_gpus
from rlhf.models.vision.processor import Processor
from rlhf.rollout.engine import EngineError
from rlhf.rollout.vllm.transport import places

LARGEST_RANK = 512
"""Of an adapter in vLLM 0.32."""


def check_vllm(config: Config, world_size: int) -> None:
    engine, section = config.rollout.engine, config.rollout.vllm
    _check_transport(config, world_size)
    if not engine.startswith("vllm"):
        return
    if not section.urls and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"rollout.engine is {engine}, but vllm is not installed: make setup EXTRAS=vllm (docs/engines.md)"
        )
    if engine == "vllm" and (section.urls or section.replicas > 1):
        raise ConfigError("rollout.vllm.urls and replicas are servers: set rollout.engine=vllm-server")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if engine == "vllm-server" and here < world_size:
        raise ConfigError(
            "rollout.engine is vllm-server, whose servers and ranks are on one host, and "
            f"{world_size - here} of the {world_size} ranks are on another: take rollout.engine=vllm"
        )


def check_adapter(config: Config, processor: Processor | None) -> None:
    """Whether vLLM can take an adapter by itself."""
    if config.rollout.vllm.lora == "merged":
        return
    lora, engine = config.model.lora, config.rollout.engine
    if lora is None or not engine.startswith("vllm"):
        raise ConfigError(
            "rollout.vllm.lora is adapter, which needs model.lora and rollout.engine=vllm or vllm-server; "
            f"the engine is {engine}{'' if lora else ', and there is no model.lora'}"
        )
    if processor is not None:
        raise ConfigError(
            f"rollout.vllm.lora is adapter, but {config.model.path} can see, and vLLM adapts the language "
            "model alone: take rollout.vllm.lora=merged"
        )
    if lora.rank > LARGEST_RANK:
        raise ConfigError(
            f"rollout.vllm.lora is adapter, and model.lora.rank = {lora.rank}: vLLM has room for "
            f"{LARGEST_RANK}; take rollout.vllm.lora=merged"
        )


def _check_transport(config: Config, world_size: int) -> None:
    """Whether weights can go to servers as is asked; those that run already say it themselves."""
    section, gpus = config.rollout.vllm, visible_gpus()
    if section.transport == "auto":
        return
    if config.rollout.engine != "vllm-server":
        raise ConfigError(
            f"rollout.vllm.transport is {section.transport}, which is how servers get weights: set "
            "rollout.engine=vllm-server, or take auto"
        )
    if section.urls and gpus:
        return
    try:
        places(section.transport, section.replicas, world_size, gpus)
    except EngineError as error:
        raise ConfigError(str(error)) from error
