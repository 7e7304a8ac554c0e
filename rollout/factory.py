"""Engines by name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from rlhf.config.rollout import VLLMConfig
from rlhf.plugins import load_object
from rlhf.rollout.engine import ImageInputs, Ranks, RolloutEngine
from rlhf.rollout.hf import HFEngine
from rlhf.rollout.learner_module import causal_model
from rlhf.rollout.native.engine import NativeEngine
from rlhf.rollout.vllm.images import ImageFormat
from rlhf.rollout.vllm.in_process import VLLMEngine, VLLMModel
from rlhf.rollout.vllm.pool import Service
from rlhf.rollout.vllm.servers import VLLMServerEngine
from rlhf.rollout.vllm.shared import SharedServers


def make_engine(
    name: str,
    model: nn.Module,
    *,
    eos_token_ids: Sequence[int],
    kv_cache_gib: float = 4.0,
    max_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    vllm: VLLMConfig | None = None,
    image_inputs: ImageInputs | None = None,
    lora_rank: int = 0,
    ranks: Ranks | None = None,
) -> RolloutEngine:
    """An engine for `model`: "native" and "hf" hold the module itself, the others are sent weights.

    If "native" cannot decode it: "hf", with a warning why. `max_tokens`: of a prompt and its completion,
    which vLLM has to know; not given: the model's limit. `dtype`: of the weights that are sent, where not
    that of `model`. `image_inputs`: for prompts with images. `lora_rank`: of the policy's adapter; 0: it has
    none. `ranks`: those that share servers. `path/file.py:name` or `package.module:name` is called with the
    model and `eos_token_ids`.
    """
    if ":" in name:
        return load_object(name)(model, eos_token_ids=eos_token_ids)
    if name == "native":
        try:
            return NativeEngine(
                model, eos_token_ids=eos_token_ids, kv_cache_gib=kv_cache_gib, image_inputs=image_inputs
            )
        except ValueError as error:
            warnings.warn(f"{error}; rollouts use the slower engine 'hf' instead", stacklevel=2)
            name = "hf"
    if name == "hf":
        return HFEngine(model, eos_token_ids=eos_token_ids, image_inputs=image_inputs)
    if name not in ("vllm", "vllm-server"):
        raise ValueError(f"unknown rollout engine {name!r}; there are native, hf, vllm and vllm-server")
    section = vllm or VLLMConfig()
    held = causal_model(model)
    sampled = VLLMModel(
        path=held.name_or_path,
        dtype=dtype or held.dtype,
        max_tokens=max_tokens or held.config.get_text_config().max_position_embeddings,
        vocabulary=held.get_input_embeddings().weight.shape[0],
        eos_token_ids=tuple(eos_token_ids),
        kv_cache_gib=kv_cache_gib,
        args=section.args,
        lora_rank=lora_rank if section.lora == "adapter" else 0,
        image_format=None if image_inputs is None else ImageFormat.of(held.config, held.dtype, image_inputs),
    )
    in_shards = isinstance(model, FSDPModule)
    return VLLMEngine(sampled) if name == "vllm" else _servers(sampled, section, ranks, in_shards=in_shards)


def _servers(
    model: VLLMModel, section: VLLMConfig, ranks: Ranks | None, *, in_shards: bool
) -> VLLMServerEngine:
    size = 1 if ranks is None else ranks.size
    # gathered for a server's GPU, what is in shards would be whole on one of the learner's
    transport = "file" if in_shards and section.transport == "auto" else section.transport
    service = Service(section.replicas, section.urls, section.deadline, transport, size)
    if ranks is not None and size > 1:
        return SharedServers(model, service, ranks)
    return VLLMServerEngine(model, service)
