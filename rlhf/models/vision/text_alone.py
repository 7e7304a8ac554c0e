"""Models that see, of a kind whose images are not supported: their language model learns from text."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

FAMILIES = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "SmolVLMProcessor",
}
"""The processor class of each supported kind of vision-language model, by its `model_type`."""


def takes_images(config: PretrainedConfig) -> bool:
    """Whether a model has a vision tower."""
    return "vision_config" in config.to_dict()


def text_alone(config: PretrainedConfig) -> str | None:
    """A sentence about a model with a vision tower that is given text alone; None: any other model."""
    if not takes_images(config) or config.model_type in FAMILIES:
        return None
    return (
        f"images of a {config.model_type} are not supported (of {', '.join(FAMILIES)} they are): its "
        "language model learns from text, and its other parts stay as they are"
    )


def leave_tower(model: PreTrainedModel) -> None:
    """Keeps all but language model and head from learning, in a model that is given text alone."""
    if text_alone(model.config) is None:
        return
    whole: Any = model
    language = whole.get_decoder(), whole.get_output_embeddings()
    learns = {id(parameter) for part in language for parameter in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in learns:
            parameter.requires_grad_(False)
