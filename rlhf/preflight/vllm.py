"""Checks of the settings of vLLM: installed, servers, adapters, weight transport."""

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
"""The largest rank of a LoRA adapter in vLLM 0.32."""


def check_vllm(config: Config, world_size: int) -> None:
    """Raises ConfigError when the settings of `rollout.engine` and `rollout.vllm` cannot work here."""
    engine, section = config.rollout.engine, config.rollout.vllm
    _check_transport(config, world_size)
    if not engine.startswith("vllm"):
        return
    if not section.urls and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"rollout.engine is {engine}, but vllm is not installed: make setup EXTRAS=vllm (docs/engines.md)"
        )
    if engine == "vllm" and (section.urls or section.replicas > 1):
        raise ConfigError(
            "rollout.vllm.urls and rollout.vllm.replicas are for servers: set rollout.engine=vllm-server"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if engine == "vllm-server" and here < world_size:
        raise ConfigError(
            "rollout.engine is vllm-server, which needs all ranks on one host, but "
            f"{world_size - here} of the {world_size} ranks are on another: set rollout.engine=vllm"
        )


def check_adapter(config: Config, processor: Processor | None) -> None:
    """Raises ConfigError when `rollout.vllm.lora` is `adapter` and vLLM cannot be sent the adapter alone."""
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
            f"rollout.vllm.lora is adapter, but {config.model.path} takes images, and vLLM applies adapters "
            "to language models only: set rollout.vllm.lora=merged"
        )
    if lora.rank > LARGEST_RANK:
        raise ConfigError(
            f"rollout.vllm.lora is adapter, and model.lora.rank = {lora.rank}: vLLM supports ranks "
            f"up to {LARGEST_RANK}; set rollout.vllm.lora=merged"
        )


def _check_transport(config: Config, world_size: int) -> None:
    """Raises ConfigError when weights cannot be sent to servers by `rollout.vllm.transport`.

    Servers that run already (`rollout.vllm.urls`) are asked when the run starts.
    """
    section, gpus = config.rollout.vllm, visible_gpus()
    if section.transport == "auto":
        return
    if config.rollout.engine != "vllm-server":
        raise ConfigError(
            f"rollout.vllm.transport is {section.transport}, which is for servers: set "
            "rollout.engine=vllm-server, or rollout.vllm.transport=auto"
        )
    if section.urls and gpus:
        return
    try:
        places(section.transport, section.replicas, world_size, gpus)
    except EngineError as error:
        raise ConfigError(str(error)) from error
