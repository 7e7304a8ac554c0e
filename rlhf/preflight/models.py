"""Checks of a run's models by their config.json and by the names and shapes in their files, without weights.

Whether log-probs of packed groups are those of the model's own forward, a run finds out with its weights
(rlhf/models/self_test.py), and `rlhf check` with a small copy of the model (trial.py).
"""

from __future__ import annotations

import importlib.util
from typing import Any, cast, get_args

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.algos.algorithm import Algorithm
from rlhf.config.model import ModelConfig
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.models.attention import constant_up_to, sliding_window
from rlhf.models.loading import why_not
from rlhf.models.lora import without_adapter
from rlhf.models.packing import Layout
from rlhf.models.policy import Policy
from rlhf.models.pretrained import (
    ModelError,
    check_weights,
    check_writes_text,
    load_model_config,
    model_folder,
    score_weight,
    text_settings,
    trust,
)
from rlhf.models.sharding import WeightFiles, names_in_files, shard_ranks
from rlhf.types import Source


def check_models(config: Config, algorithm: Algorithm) -> None:
    """Raises ModelError: a model that the run loads is not there, or its files are damaged."""
    writers, critic = models_of(config, algorithm)
    paths = [*writers, *([] if critic is None else [critic])]
    for path in paths if config.model.trust_remote_code else ():
        trust(path)
    for path in writers:
        check_writes_text(path, load_model_config(path))
    if critic is not None:
        load_model_config(critic)


def check_lengths(config: Config, model: PretrainedConfig) -> None:
    """Raises ConfigError when the longest sequences that the settings allow do not fit the model."""
    longest = config.longest
    same = constant_up_to(model)
    if same is not None and longest > same:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_completion_tokens = {longest}, but the rotary factors of "
            f"{config.model.path} change beyond {same} tokens (LongRoPE or dynamic RoPE), and log-probs "
            "would depend on the longest sequence of a batch; lower one of the two"
        )
    limit = text_settings(model).get("max_position_embeddings")
    if limit is not None and longest > limit:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_completion_tokens = {longest}, but {config.model.path} "
            f"has positions for {limit} tokens; lower one of the two"
        )


def check_trainable(section: ModelConfig, model: PretrainedConfig) -> None:
    """Raises ConfigError when the weights are quantized, or the package for adapters is missing."""
    quantization = model.to_dict().get("quantization_config")
    if quantization is not None:
        method = cast(dict[str, Any], quantization).get("quant_method", "an unknown method")
        what = "QLoRA is not supported" if section.lora else "quantized weights cannot be trained"
        raise ConfigError(
            f"the weights of {section.path} are quantized ({method}): {what}; set model.path to the "
            "model it was made from"
        )
    if section.lora is not None and importlib.util.find_spec("peft") is None:
        raise ConfigError("model.lora is set, but peft is not installed: pip install 'tandem-rl[lora]'")


def check_weight_files(config: Config, algorithm: Algorithm, world_size: int) -> None:
    """Raises ModelError: the files of a model that the run loads lack some of its weights, or it cannot be
    packed, adapted or sharded as the settings say. Raises ValueError: so many ranks cannot be sharded over.
    """
    writers, critic = models_of(config, algorithm)
    sharded = config.distributed.mode == "sharded" and world_size > 1
    if sharded:
        shard_ranks(config.distributed, world_size)
    for path in writers:
        check_policy(config.model, path, config.longest, sharded=sharded)
    if critic is None or (model := check_weights(critic, head=False)) is None:
        return
    weight = score_weight(critic, model)
    if weight is not None and len(weight) != 1:
        raise ModelError(
            f"critic.path {critic} gives {len(weight)} scores a text; a critic starts from one that gives "
            "one score, or from a causal language model"
        )
    if sharded:
        _check_sharded(critic, model if weight is None else model.base_model)


def check_policy(section: ModelConfig, path: str, longest: int | None, *, sharded: bool = False) -> None:
    """Raises ModelError: the model at `path` lacks weights, or cannot do what the settings of `section` ask
    for. Of a model on the hub nothing is known yet. `longest`: tokens of the longest sequence, if known."""
    model = check_weights(path)
    if model is None:
        return
    Policy(model, layout="padded")
    if section.packing in get_args(Layout):
        window = sliding_window(model.config, longest)
        reason = why_not(model, cast(Layout, section.packing), window)
        if reason is not None:
            raise ModelError(f"model.packing is {section.packing}, but {path} cannot: {reason}")
    if section.lora is not None and path == section.path:
        without_adapter(model, section.lora.targets)
    if sharded:
        _check_sharded(path, model)


def _check_sharded(path: str, model: PreTrainedModel) -> None:
    parameters: nn.Module = model
    names_in_files(parameters, WeightFiles(model_folder(path)))


def models_of(config: Config, algorithm: Algorithm) -> tuple[list[str], str | None]:
    """The causal language models that the run loads, and the model that its critic starts from."""
    section = config.model
    sampled = config.rollout.sources & {Source.REFERENCE, Source.MIXTURE}
    references = section.references.values() if algorithm.needs_reference or sampled else ()
    own = algorithm.critic is not None and config.critic.trunk == "own"
    critic = config.critic.path or section.path if own else None
    return list(dict.fromkeys([section.path, *references])), critic
