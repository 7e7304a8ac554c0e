"""Sends images to vLLM already processed by the learner's image processor; vLLM's processors are not used.

1. A request has the output of the learner's processor: token ids with all placeholders expanded, pixels in
   the model's dtype, and the ranges of placeholders for the features of each item. So engine and learner
   compute with the same numbers, and no placeholder is expanded twice or to another length.
2. vLLM's model class is registered with a processor that refuses to process; it knows only that an image has
   no more tokens than a prompt may have.
3. An item is what has a contiguous range in the prompt: an image of Qwen-VL, or one tile of Idefics3 or
   SmolVLM. It is named by a digest of its pixels; equal items are encoded once, until the next weight update.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rlhf.rollout.engine import EngineError, ImageInputs
from rlhf.types import Prompt

MODEL_CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}
"""vLLM's class of each supported model type that takes images, in vLLM's module of the type's name."""
KIND_VARIABLE = "TANDEM_SEES"
"""Environment variable with the model type, for the processes of a server (`serve.py`)."""
MODALITY = "image"
IMAGE_ENGINE_ARGS = {
    "skip_mm_profiling": True,
    "mm_processor_cache_gb": 0,
    # the pixels are normalised already
    "mm_device_do_normalize": False,
}
"""Arguments of vLLM's engine for images that the learner's processor has processed."""
INPUTS_MODULE = "vllm.multimodal.inputs"
SERDE_MODULE = "vllm.entrypoints.scale_out.token_in_token_out.mm_serde"
TORCHVISION = "transformers.models.qwen2_vl.image_processing_qwen2_vl"
PIL = "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl"


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """How the images of a model are laid out.

    `kind` is the model type. `merge`: number of patches per placeholder (Qwen-VL); `tile_tokens`: number of
    placeholders per tile (the other models).
    """

    kind: str
    image_token_id: int
    dtype: torch.dtype
    image_inputs: ImageInputs
    merge: int = 1
    tile_tokens: int = 0

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype, image_inputs: ImageInputs) -> ImageFormat:
        """The format for a Hugging Face model with that `config`."""
        kind, token, vision = config.model_type, config.image_token_id, config.vision_config
        if kind.startswith("qwen"):
            return cls(kind, token, dtype, image_inputs, merge=vision.spatial_merge_size**2)
        side = vision.image_size // vision.patch_size
        return cls(kind, token, dtype, image_inputs, tile_tokens=side**2 // config.scale_factor**2)


@dataclass(frozen=True, slots=True)
class ProcessedImages:
    """The processed images of a request, item by item."""

    ranges: tuple[tuple[int, int], ...]
    """Index of the first placeholder and the number of placeholders, per item."""
    names: tuple[str, ...]
    items: Any
    """vLLM's own objects for the items (`MultiModalKwargsItem`)."""

    def engine_input(self, token_ids: Sequence[int]) -> Any:
        """The input of the engine in this process for a prompt with these images."""
        inputs: Any = importlib.import_module(INPUTS_MODULE)
        ranges = [inputs.PlaceholderRange(offset=offset, length=length) for offset, length in self.ranges]
        return importlib.import_module("vllm.inputs").mm_input(
            prompt_token_ids=list(token_ids),
            mm_kwargs=inputs.MultiModalKwargsItems({MODALITY: self.items}),
            mm_hashes={MODALITY: list(self.names)},
            mm_placeholders={MODALITY: ranges},
        )

    def features(self) -> dict[str, Any]:
        """The field `features` of a request to a server (msgpack in base64)."""
        serde: Any = importlib.import_module(SERDE_MODULE)
        return {
            "mm_hashes": {MODALITY: list(self.names)},
            "mm_placeholders": {MODALITY: [{"offset": o, "length": n} for o, n in self.ranges]},
            "kwargs_data": {MODALITY: [serde.encode_mm_kwargs_item(item) for item in self.items]},
        }


def processed_images(image_format: ImageFormat, prompt: Prompt) -> ProcessedImages:
    """The prompt's images, processed. Raises EngineError if its placeholders do not fit its images."""
    tensors = {name: tensor.cpu() for name, tensor in image_format.image_inputs.inputs(prompt).items()}
    parts, counts = (
        _qwen_tensors(image_format, tensors)
        if "image_grid_thw" in tensors
        else _tile_tensors(image_format, tensors)
    )
    ranges = _placeholder_ranges(image_format, prompt, counts)
    fields: Any = importlib.import_module(INPUTS_MODULE)
    # the learner's vision tower rounds pixels to the dtype of its weights too
    pixels = {
        name: t.to(image_format.dtype) if t.is_floating_point() else t for name, (t, _) in parts.items()
    }
    layout: dict[str, Any] = {
        name: fields.MultiModalFieldConfig.batched(MODALITY, keep_on_cpu=True)
        if sizes is None
        else fields.MultiModalFieldConfig.flat_from_sizes(MODALITY, sizes)
        for name, (_, sizes) in parts.items()
    }
    items = list(fields.MultiModalKwargsItems.from_hf_inputs(pixels, layout)[MODALITY])
    names = tuple(_name({name: element.data for name, element in item.items()}) for item in items)
    return ProcessedImages(ranges, names, items)


ItemTensors = dict[str, tuple[Tensor, Tensor | None]]
"""By argument of the model: a tensor and the number of its rows per item (None: one row per item)."""


def _qwen_tensors(image_format: ImageFormat, tensors: Mapping[str, Tensor]) -> tuple[ItemTensors, list[int]]:
    grid = tensors["image_grid_thw"]
    sizes = grid.prod(-1)
    counts = [int(size) // image_format.merge for size in sizes]
    return {"pixel_values": (tensors["pixel_values"], sizes), "image_grid_thw": (grid, None)}, counts


def _tile_tensors(image_format: ImageFormat, tensors: Mapping[str, Tensor]) -> tuple[ItemTensors, list[int]]:
    pixels = tensors["pixel_values"].flatten(0, 1)
    mask = tensors["pixel_attention_mask"].flatten(0, 1)
    ones = torch.ones(len(pixels), dtype=torch.long)
    parts: ItemTensors = {
        "pixel_values": (pixels, ones),
        "pixel_attention_mask": (mask, ones),
        "num_patches": (ones, None),
    }
    return parts, [image_format.tile_tokens] * len(pixels)


def _placeholder_ranges(
    image_format: ImageFormat, prompt: Prompt, counts: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    placeholders = list(prompt.image_places or ())
    if prompt.image_places is None:
        placeholders = [i for i, token in enumerate(prompt.token_ids) if token == image_format.image_token_id]
    if len(placeholders) != sum(counts):
        raise EngineError(
            f"{prompt.id}: its prompt has {len(placeholders)} placeholders, its images make {sum(counts)} "
            "features; was it tokenised by another processor?"
        )
    ranges: list[tuple[int, int]] = []
    for count in counts:
        item, placeholders = placeholders[:count], placeholders[count:]
        if item[-1] - item[0] + 1 != count:
            raise EngineError(
                f"{prompt.id}: the {count} placeholders of one image, from token {item[0]} on, are not "
                "together; was it tokenised by another processor?"
            )
        ranges.append((item[0], count))
    return tuple(ranges)


def _name(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        flat = tensor.contiguous().flatten()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(flat.view(torch.uint8).numpy().data if math.prod(tensor.shape) else b"")
    return found.hexdigest()


def accept_processed_images(kind: str) -> None:
    """Registers vLLM's class of that model type with a processor that refuses to process images."""
    with _without_torchvision():
        module: Any = importlib.import_module(f"vllm.model_executor.models.{kind}")
    theirs = getattr(module, MODEL_CLASSES[kind])
    ours = type(MODEL_CLASSES[kind], (theirs,), {"__module__": __name__})
    processing: Any = importlib.import_module("vllm.multimodal.processing")
    registry: Any = importlib.import_module("vllm.multimodal").MULTIMODAL_REGISTRY

    class Info(processing.BaseProcessingInfo):
        def get_supported_mm_limits(self) -> dict[str, None]:
            return {MODALITY: None}

        def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: object) -> dict[str, int]:
            return {MODALITY: seq_len}

    def refuse(*_: object) -> Any:
        raise EngineError("vllm was asked to process an image, but expects processed images only")

    given = {"requires_tokenizer": False, "_get_mm_fields_config": refuse, "_get_prompt_updates": refuse}
    dummy = {"get_dummy_text": refuse, "get_dummy_mm_data": refuse}
    registry.register_processor(
        type("ProcessedImagesOnly", (processing.BaseMultiModalProcessor,), given),
        info=Info,
        dummy_inputs=type("NoDummies", (processing.BaseDummyInputsBuilder,), dummy),
    )(ours)
    importlib.import_module("vllm").ModelRegistry.register_model(MODEL_CLASSES[kind], ours)


@contextmanager
def _without_torchvision() -> Generator[None]:
    """Puts the PIL version of a module that needs torchvision in its place; vLLM needs one function of it."""
    absent = find_spec("torchvision") is None and TORCHVISION not in sys.modules
    if absent:
        sys.modules[TORCHVISION] = importlib.import_module(PIL)
    try:
        yield
    finally:
        if absent:
            del sys.modules[TORCHVISION]
