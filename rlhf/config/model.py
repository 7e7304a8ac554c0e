"""The sections `model` and `model.lora`: the model that is trained, its reference, its adapter."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhf.config.section import Positive, Section


class LoraConfig(Section):
    """A low-rank adapter, which is trained in place of the model's weights as soon as `model.lora` is given
    (`model.lora: {}` takes these defaults). The reference is then the model with its adapter switched off."""

    rank: Positive = 16
    """Rank of the adapter: the inner dimension of its two factors B and A. A higher one can learn more."""
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    """Scale of the adapter: its product B A is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Linear layers that get an adapter, by the last part of their names (`q_proj`); empty: all of them
    except the language-model head."""
    dropout: float = 0.0
    """Must be 0: with dropout, log-probs before and after an update would be those of two functions."""

    @model_validator(mode="before")
    @classmethod
    def is_no_qlora(cls, settings: Any) -> Any:
        named = [key for key in settings or () if re.search("quant|bit|qlora", str(key).lower())]
        if named:
            raise ValueError(
                f"{named[0]}: QLoRA is not supported, the weights below an adapter must be in model.dtype"
            )
        return settings

    @field_validator("dropout")
    @classmethod
    def is_one_function(cls, dropout: float) -> float:
        if dropout:
            raise ValueError(
                f"must be 0, got {dropout:g}: with dropout, log-probs before and after an update would be "
                "those of two functions"
            )
        return dropout


class ModelConfig(Section):
    """The model that is trained, the reference it is compared with, and how groups go through them."""

    path: str
    """Model to train: a causal language model of Hugging Face (vision-language: docs/papo.md), as a local
    folder or, with a network, a name on the hub."""
    reference: str | dict[str, str] | None = None
    """Frozen model that the KL terms compare the policy with; not given: the policy as it is at the start.
    Several by name, `{math: PATH, chat: PATH}`: each line of the data is compared with the one that its
    `data.reference_column` names."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type that policy, reference, critic and engine compute in; the optimizer's master weights
    are always float32. `auto`: bfloat16 on a GPU, on a CPU the faster of the two, which a short measurement
    finds. RUN/config.yaml has the type that was chosen, and a resumed run keeps it."""
    trust_remote_code: bool = False
    """Lets Python code that `path`, `reference` and `critic.path` bring run with your rights: read it before.
    Without it models that need code of their own are refused."""
    packing: Literal["auto", "shared_prefix", "packed", "padded"] = "auto"
    """How a group goes through the model. `shared_prefix`: its prompt once, all completions behind it.
    `packed`: sequences end to end, each with its prompt. `padded`: each sequence in a padded row. `auto`: the
    first of these that the model can do."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more
    time."""
    lora: LoraConfig | None = None
    """Given: only an adapter is trained."""

    @model_validator(mode="before")
    @classmethod
    def may_be_a_path_alone(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given

    @field_validator("lora", mode="before")
    @classmethod
    def may_be_a_rank_alone(cls, given: Any) -> Any:
        """`true`: an adapter with the defaults; a number: its rank."""
        if isinstance(given, bool):
            return {} if given else None
        return {"rank": given} if isinstance(given, int) else given

    @field_validator("reference")
    @classmethod
    def names_a_model(cls, reference: str | dict[str, str] | None) -> str | dict[str, str] | None:
        if reference == {}:
            raise ValueError("is {}: name a model, or several as {math: PATH, chat: PATH}")
        return reference

    @property
    def references(self) -> dict[str, str]:
        """The paths that `reference` gives, each by the setting that gives it; empty: it gives none."""
        if isinstance(self.reference, dict):
            return {f"model.reference.{name}": path for name, path in self.reference.items()}
        return {} if self.reference is None else {"model.reference": self.reference}
