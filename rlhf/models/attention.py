"""What the attention of a model is: implementation, windows, caps of scores, limits of rotary factors."""

from __future__ import annotations

from typing import Any, cast

from transformers import PretrainedConfig

from rlhf.models.pretrained import text_settings

DEFINITION = "eager"
"""The attention as the code of a model writes it out; the others leave out what their kernels do not have."""


def attention_of(model: Any) -> str:
    """The registered name of the language model's attention; transformers has no public way to ask for it."""
    return model.config.get_text_config()._attn_implementation


def set_attention(model: Any, name: str) -> None:
    """Sets the language model's attention by its registered name; a vision tower keeps its own."""
    text = model.config.get_text_config()
    parts = {part: name for part in model.config.sub_configs if getattr(model.config, part) is text}
    model.set_attn_implementation(parts or name)


def takes_attention(model: Any) -> bool:
    """Whether the model takes its attention from transformers' AttentionInterface."""
    return model._supports_attention_backend


def caps_attention(config: PretrainedConfig) -> bool:
    """Whether attention scores go through a soft cap, which transformers' "sdpa" leaves out."""
    return bool(text_settings(config).get("attn_logit_softcapping"))


def sliding_window(config: PretrainedConfig, longest: int | None = None) -> int | None:
    """Tokens of the sliding window of a model's layers; None: they see all earlier tokens of a sequence.

    `longest`: tokens of the longest sequence; None: unknown.
    """
    settings = text_settings(config)
    kinds: set[str] = set(settings.get("layer_types") or ())
    window = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    # some configs write 0 for none
    if not window or (kinds and "sliding_attention" not in kinds):
        return None
    return None if longest is not None and window >= longest else window


def constant_up_to(config: PretrainedConfig) -> int | None:
    """Tokens of a sequence up to which a model's rotary factors are the same for all lengths; None: always.

    Beyond, transformers takes other factors (LongRoPE), or some that depend on the length (dynamic RoPE), for
    all tokens of a batch, after the longest of its sequences: log-probs would depend on their neighbours.
    """
    settings = text_settings(config)
    rope: dict[str, Any] = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    # layers of different types may have parameters of their own, by type
    several = [cast(dict[str, Any], entry) for entry in rope.values() if isinstance(entry, dict)] or [rope]
    limits: list[int] = []
    for parameters in several:
        kind = str(parameters.get("rope_type", parameters.get("type")))
        own = parameters.get("original_max_position_embeddings")
        if kind == "longrope":
            own = own or settings.get("original_max_position_embeddings")
            limits.append(own or settings["max_position_embeddings"])
        elif "dynamic" in kind:
            limits.append(settings["max_position_embeddings"])
    return min(limits, default=None)
