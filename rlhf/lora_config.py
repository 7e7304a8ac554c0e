"""The section `model.lora`."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from rlhf.settings import Positive, Section


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
