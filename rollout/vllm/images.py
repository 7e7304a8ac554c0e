"""Pictures through vLLM: pixels and placeholders are the learner's own, its processors are never asked.

1. A request brings what the learner's processor made: token ids with every placeholder there already, the
   pixels in the model's dtype, and where the features of each go. So engine and learner see the same numbers,
   whatever back end processors would take, and no placeholder is expanded twice or to another length.
2. vLLM's class of the model is registered with a processor that refuses to process, and knows one thing: a
   picture has no more tokens than a prompt may have.
3. An item is what stands together in the prompt: a picture of Qwen-VL, one tile of Idefics3 or SmolVLM.
   Its name is a digest of its pixels; equal ones are encoded once, until the next weight update.
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

KINDS = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}
"""Kinds of models that can see, and vLLM's class of each, in its module of that name."""
MARK = "TANDEM_SEES"
"""Environment variable that tells the processes of a server the kind of its model."""
MODALITY = "image"
SEES = {
    "skip_mm_profiling": True,
    "mm_processor_cache_gb": 0,
    # it would subtract the mean of pixels from what has none any more
    "mm_device_do_normalize": False,
}
"""Of vLLM's engine, for a model that is given pixels as the learner's processor made them."""
INPUTS = "vllm.multimodal.inputs"
WIRE = "vllm.entrypoints.scale_out.token_in_token_out.mm_serde"
TORCHVISION = "transformers.models.qwen2_vl.image_processing_qwen2_vl"
PIL = "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl"


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """How a model of vLLM is given pictures. `merge`: features a placeholder, of Qwen-VL; `tile_tokens`:
    placeholders a tile, of the others.
    """

    kind: str
    image_token_id: int
    dtype: torch.dtype
    image_inputs: ImageInputs
    merge: int = 1
    tile_tokens: int = 0

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype, image_inputs: ImageInputs) -> ImageFormat:
        """`config`: of the Hugging Face model."""
        kind, token, vision = config.model_type, config.image_token_id, config.vision_config
        if kind.startswith("qwen"):
            return cls(kind, token, dtype, image_inputs, merge=vision.spatial_merge_size**2)
        side = vision.image_size // vision.patch_size
        return cls(kind, token, dtype, image_inputs, tile_tokens=side**2 // config.scale_factor**2)


@dataclass(frozen=True, slots=True)
class Given:
    """What a request brings of its pictures, item by item."""

    places: tuple[tuple[int, int], ...]
    """First placeholder and their number."""
    names: tuple[str, ...]
    items: Any
    """vLLM's own kind of them."""

    def engine_input(self, token_ids: Sequence[int]) -> Any:
        """For an engine of this process."""
        inputs: Any = importlib.import_module(INPUTS)
        ranges = [inputs.PlaceholderRange(offset=offset, length=length) for offset, length in self.places]
        return importlib.import_module("vllm.inputs").mm_input(
            prompt_token_ids=list(token_ids),
            mm_kwargs=inputs.MultiModalKwargsItems({MODALITY: self.items}),
            mm_hashes={MODALITY: list(self.names)},
            mm_placeholders={MODALITY: ranges},
        )

    def features(self) -> dict[str, Any]:
        """`features` of a request to a server; msgpack in base64."""
        serde: Any = importlib.import_module(WIRE)
        return {
            "mm_hashes": {MODALITY: list(self.names)},
            "mm_placeholders": {MODALITY: [{"offset": o, "length": n} for o, n in self.places]},
            "kwargs_data": {MODALITY: [serde.encode_mm_kwargs_item(item) for item in self.items]},
        }


def given_pictures(image_format: ImageFormat, prompt: Prompt) -> Given:
    """Raises EngineError with the prompt's id: its placeholders are not those of its pictures."""
    tensors = {name: tensor.cpu() for name, tensor in image_format.image_inputs.inputs(prompt).items()}
    parts, counts = (
        _qwen_parts(image_format, tensors) if "image_grid_thw" in tensors else _tiles(image_format, tensors)
    )
    places = _places(image_format, prompt, counts)
    fields: Any = importlib.import_module(INPUTS)
    # the learner's eyes round to the type of their weights as well
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
    return Given(places, names, items)


Parts = dict[str, tuple[Tensor, Tensor | None]]
"""By argument of the model: a tensor, and how many of its rows each item has; None: it has one number or
row an item."""


def _qwen_parts(image_format: ImageFormat, tensors: Mapping[str, Tensor]) -> tuple[Parts, list[int]]:
    grid = tensors["image_grid_thw"]
    sizes = grid.prod(-1)
    counts = [int(size) // image_format.merge for size in sizes]
    return {"pixel_values": (tensors["pixel_values"], sizes), "image_grid_thw": (grid, None)}, counts


def _tiles(image_format: ImageFormat, tensors: Mapping[str, Tensor]) -> tuple[Parts, list[int]]:
    pixels = tensors["pixel_values"].flatten(0, 1)
    mask = tensors["pixel_attention_mask"].flatten(0, 1)
    ones = torch.ones(len(pixels), dtype=torch.long)
    parts: Parts = {
        "pixel_values": (pixels, ones),
        "pixel_attention_mask": (mask, ones),
        "num_patches": (ones, None),
    }
    return parts, [image_format.tile_tokens] * len(pixels)


def _places(image_format: ImageFormat, prompt: Prompt, counts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    there = [i for i, token in enumerate(prompt.token_ids) if token == image_format.image_token_id]
    if len(there) != sum(counts):
        raise EngineError(
            f"{prompt.id}: its prompt has {len(there)} placeholders, its pictures make {sum(counts)} "
            "features; was it tokenised by another processor?"
        )
    places: list[tuple[int, int]] = []
    for count in counts:
        mine, there = there[:count], there[count:]
        if mine[-1] - mine[0] + 1 != count:
            raise EngineError(
                f"{prompt.id}: the {count} placeholders from token {mine[0]} on are of one picture and do "
                "not stand together; was it tokenised by another processor?"
            )
        places.append((mine[0], count))
    return tuple(places)


def _name(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        flat = tensor.contiguous().flatten()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(flat.view(torch.uint8).numpy().data if math.prod(tensor.shape) else b"")
    return found.hexdigest()


def take_given_pictures(kind: str) -> None:
    """Registers vLLM's class of that kind, with a processor that is never asked to process anything."""
    with _pillow_will_do():
        module: Any = importlib.import_module(f"vllm.model_executor.models.{kind}")
    theirs = getattr(module, KINDS[kind])
    ours = type(KINDS[kind], (theirs,), {"__module__": __name__})
    processing: Any = importlib.import_module("vllm.multimodal.processing")
    registry: Any = importlib.import_module("vllm.multimodal").MULTIMODAL_REGISTRY

    class Info(processing.BaseProcessingInfo):
        def get_supported_mm_limits(self) -> dict[str, None]:
            return {MODALITY: None}

        def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: object) -> dict[str, int]:
            return {MODALITY: seq_len}

    def refuse(*_: object) -> Any:
        raise EngineError("pictures come with their pixels, vllm has nothing to process")

    given = {"requires_tokenizer": False, "_get_mm_fields_config": refuse, "_get_prompt_updates": refuse}
    dummy = {"get_dummy_text": refuse, "get_dummy_mm_data": refuse}
    registry.register_processor(
        type("GivenPictures", (processing.BaseMultiModalProcessor,), given),
        info=Info,
        dummy_inputs=type("NoDummies", (processing.BaseDummyInputsBuilder,), dummy),
    )(ours)
    importlib.import_module("vllm").ModelRegistry.register_model(KINDS[kind], ours)


@contextmanager
def _pillow_will_do() -> Generator[None]:
    """vLLM's classes take one function about sizes from a module that needs torchvision; its twin has it."""
    absent = find_spec("torchvision") is None and TORCHVISION not in sys.modules
    if absent:
        sys.modules[TORCHVISION] = importlib.import_module(PIL)
    try:
        yield
    finally:
        if absent:
            del sys.modules[TORCHVISION]
