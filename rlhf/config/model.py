"""The sections `model` and `model.lora`: what is trained."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhf.config.section import Positive, Section


class LoraConfig(Section):
    """Trains a low-rank adapter instead of the weights (rlhf/lora.py)."""

    rank: Positive = 16
    """Of both factors of the adapter."""
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    """The adapter's product is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Linear layers by the last part of their names (`q_proj`); empty: all but the language-model head."""
    dropout: float = 0.0
    """0 is the only one."""

    @model_validator(mode="before")
    @classmethod
    def is_no_qlora(cls, settings: Any) -> Any:
        named = [key for key in settings or () if re.search("quant|bit|qlora", str(key).lower())]
        if named:
            raise ValueError(
                f"{named[0]}: QLoRA is not supported, an adapter stands on weights of model.dtype"
            )
        return settings

    @field_validator("dropout")
    @classmethod
    def is_one_function(cls, dropout: float) -> float:
        if dropout:
            raise ValueError(
                f"must be 0, got {dropout:g}: log-probs before and after an update must be of one function"
            )
        return dropout


class ModelConfig(Section):
    path: str
    """Hugging Face causal language model: a local folder, or a hub name where there is a network."""
    reference: str | None = None
    """Frozen reference of the KL terms; the model itself at the start of the run when not given."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the compute copy. The optimizer's master copy is always float32."""
    packing: Literal["auto", "shared_prefix", "packed", "padded"] = "auto"
    """How a group goes through the model: its prompt once, every sequence by itself, or that padded."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train a LoRA adapter only; the reference is then the model with its adapter switched off."""
