"""Makes a rollout engine from its name in the settings (`rollout.engine`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from rlhf.config.rollout import VLLMConfig
from rlhf.plugins import load_object
from rlhf.rollout.engine import EngineError, ImageInputs, Ranks, RolloutEngine
from rlhf.rollout.hf import HFEngine
from rlhf.rollout.learner_module import causal_model
from rlhf.rollout.mixture import HFMixtureEngine, OtherModel
from rlhf.rollout.native.engine import NativeEngine
from rlhf.rollout.native.mixture import NativeMixtureEngine
from rlhf.rollout.native.model_support import check_decoding
from rlhf.rollout.vllm.images import ImageFormat
from rlhf.rollout.vllm.in_process import VLLMEngine, VLLMModel
from rlhf.rollout.vllm.server_engine import VLLMServerEngine
from rlhf.rollout.vllm.server_pool import Service
from rlhf.rollout.vllm.shared_servers import SharedServers

EXPECTED = "native, hf, vllm, vllm-server, path/file.py:name or package.module:name"


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
    """An engine for `model`: "native" and "hf" sample from the module itself, vLLM engines are sent weights.

    If "native" cannot decode the model, "hf" takes its place, with a warning that says why. A name like
    `path/file.py:name` or `package.module:name` is a user's function, called with `model` and
    `eos_token_ids`. `image_inputs` is needed for prompts with images. `max_tokens` limits prompt and
    completion together (default: the model's limit). The other arguments are for vLLM: `dtype` is that of the
    weights sent (default: that of `model`), `lora_rank` that of the policy's adapter (0: none), and `ranks`
    share servers. Raises ValueError for an unknown name, EngineError if vLLM cannot start.
    """
    if ":" in name:
        return load_object(name)(model, eos_token_ids=eos_token_ids)
    if name == "native":
        return _native_or_hf(model, eos_token_ids, kv_cache_gib, max_tokens, image_inputs)
    if name == "hf":
        return _hf(model, eos_token_ids, image_inputs)
    if name not in ("vllm", "vllm-server"):
        raise ValueError(f"unknown rollout engine {name!r}: expected {EXPECTED}")
    section = vllm or VLLMConfig()
    causal = causal_model(model)
    image_format = None
    if image_inputs is not None:
        image_format = ImageFormat.of(causal.config, causal.dtype, image_inputs)
    vllm_model = VLLMModel(
        path=causal.name_or_path,
        dtype=dtype or causal.dtype,
        max_tokens=max_tokens or causal.config.get_text_config().max_position_embeddings,
        vocabulary=causal.get_input_embeddings().weight.shape[0],
        eos_token_ids=tuple(eos_token_ids),
        kv_cache_gib=kv_cache_gib,
        args=section.args,
        lora_rank=lora_rank if section.lora == "adapter" else 0,
        image_format=image_format,
    )
    if name == "vllm":
        return VLLMEngine(vllm_model)
    return _servers(vllm_model, section, ranks, is_sharded=isinstance(model, FSDPModule))


def mixture_engine(
    name: str,
    model: nn.Module,
    other: OtherModel,
    *,
    eos_token_ids: Sequence[int],
    kv_cache_gib: float = 4.0,
    max_tokens: int | None = None,
    image_inputs: ImageInputs | None = None,
) -> RolloutEngine:
    """An engine, "native" or "hf", that samples from geometric mixtures of `model` and `other`.

    The weight of `other` is that of each request (`RolloutRequest.mixture`), so one engine serves several
    weights; 0 is the policy. `update_weights` takes the weights of `model`; call it also when those of
    `other` have changed in place. If "native" cannot decode one of the models, "hf" takes its place, with
    a warning that says why. Raises EngineError for other engines, and for models that cannot be mixed:
    sharded, of different vocabularies, on different devices, or with images for "hf".
    """
    if name not in ("native", "hf"):
        raise EngineError(
            f"a mixture of two models cannot be sampled with the engine {name!r}, which decodes with one "
            "model; expected native or hf"
        )
    if name == "native":
        try:
            return NativeMixtureEngine(
                model,
                other,
                eos_token_ids=eos_token_ids,
                kv_cache_gib=kv_cache_gib,
                max_tokens=max_tokens,
                image_inputs=image_inputs,
            )
        except EngineError:
            raise
        except ValueError as error:
            warnings.warn(f"{error}; mixtures are sampled by the slower engine 'hf' instead", stacklevel=2)
    engine = HFMixtureEngine(model, other, eos_token_ids=eos_token_ids, image_inputs=image_inputs)
    _check_cache(engine, model, stacklevel=3)
    return engine


def _native_or_hf(
    model: nn.Module,
    eos_token_ids: Sequence[int],
    kv_cache_gib: float,
    max_tokens: int | None,
    image_inputs: ImageInputs | None,
) -> NativeEngine | HFEngine:
    try:
        return NativeEngine(
            model,
            eos_token_ids=eos_token_ids,
            kv_cache_gib=kv_cache_gib,
            max_tokens=max_tokens,
            image_inputs=image_inputs,
        )
    except ValueError as error:
        # attributed to the caller of `make_engine`
        warnings.warn(f"{error}; rollouts use the slower engine 'hf' instead", stacklevel=3)
        return _hf(model, eos_token_ids, image_inputs)


def _hf(model: nn.Module, eos_token_ids: Sequence[int], image_inputs: ImageInputs | None) -> HFEngine:
    """The engine `hf`, with or without a cache."""
    engine = HFEngine(model, eos_token_ids=eos_token_ids, image_inputs=image_inputs)
    _check_cache(engine, model, stacklevel=5)
    return engine


def _check_cache(engine: HFEngine, model: nn.Module, *, stacklevel: int) -> None:
    """Has `hf` decode without a cache where decoding with one does not reproduce the model's log-probs.

    Raises ValueError: neither does decoding without one.
    """
    trial = HFEngine(model, eos_token_ids=())
    try:
        check_decoding(trial, causal_model(model))
    except ValueError as error:
        trial.use_cache = engine.use_cache = False
        # raises where that is wrong too
        check_decoding(trial, causal_model(model))
        warnings.warn(f"{error}; every token is computed without a cache instead", stacklevel=stacklevel)


def _servers(
    model: VLLMModel, section: VLLMConfig, ranks: Ranks | None, *, is_sharded: bool
) -> VLLMServerEngine:
    size = 1 if ranks is None else ranks.size
    # to send a sharded model to a server's GPU, one GPU of the learner would have to hold it whole
    transport = "file" if is_sharded and section.transport == "auto" else section.transport
    service = Service(section.replicas, section.urls, section.deadline, transport, size)
    if ranks is not None and size > 1:
        return SharedServers(model, service, ranks)
    return VLLMServerEngine(model, service)
