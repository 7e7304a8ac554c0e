"""A model's own processor: chat messages with pictures -> token ids, and pictures -> what its eyes take.

The parts for pictures alone are loaded, with the PIL back end where torchvision is not installed, so nothing
of a model's video input is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from jinja2 import TemplateError
from PIL import Image as pil
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.models.pretrained import ModelError, load_model_config, local_or_hub
from rlhf.models.vision.images import ImageError, masked, open_picture, separate_pictures
from rlhf.types import Image, Images

FAMILIES = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "SmolVLMProcessor",
}
"""Kinds of models that can see, and the processor of each."""
CACHE_BYTES = 256 << 20
FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)

# its annotations are too incomplete for a strict check
_transformers: Any = transformers


@dataclass(frozen=True, slots=True)
class Pixels:
    """What the model takes for the pictures of one prompt, by the names of its arguments."""

    tensors: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Processor:
    """Of one model; pictures are processed when they are needed, and the last ones are kept."""

    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ModelError: the model's processor cannot be loaded."""
        config: Any = load_model_config(path)
        self.path, self.family = path, cast(str, config.model_type)
        self.image_token_id = cast(int, config.image_token_id)
        self.tokenizer = tokenizer
        self._processor: Any = _load(path, self.family, tokenizer)
        self._kept: OrderedDict[tuple[Any, ...], Pixels] = OrderedDict()
        self._room = CACHE_BYTES

    @property
    def has_axes(self) -> bool:
        """Whether a token's position is one of time, height and width (mrope)."""
        return self.family.startswith("qwen")

    @property
    def placeholder(self) -> str:
        """What stands for a picture in text."""
        return cast(str, self._processor.image_token)

    def prompt(
        self, prompt_id: str, messages: Sequence[Mapping[str, Any]], loose: object, folder: Path
    ) -> tuple[list[dict[str, Any]], tuple[Image, ...], list[int]]:
        """A dataset's messages -> messages without the pictures themselves, those, and the token ids.

        `loose`: pictures that stand beside the messages. Raises ImageError (rlhf/pictures.py).
        """
        written, sources = separate_pictures(messages, loose, folder)
        return written, sources, self.token_ids(self.write(written), Images(prompt_id, sources))

    def write(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Messages as the model's chat template writes them, with the opening of its own turn."""
        tokenizer = cast(Any, self.tokenizer)
        template = self._processor.chat_template or tokenizer.chat_template
        if not template:
            raise ImageError(f"{self.path} has no chat template to write messages with pictures")
        try:
            # the tokenizer's, which asks for no video
            return tokenizer.apply_chat_template(
                list(messages), chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise ImageError(f"the chat template refuses the prompt: {error}") from None

    def token_ids(self, text: str, images: Images) -> list[int]:
        """`text` with one placeholder a picture -> token ids with as many as the model has features for it.

        Raises ImageError: a picture cannot be read, or there are more or fewer placeholders than pictures.
        """
        marks, count = text.count(self.placeholder), len(images.sources)
        if marks != count:
            raise ImageError(f"its text has {marks} placeholders for {count} pictures")
        if not count:
            return cast(Any, self.tokenizer)(text, add_special_tokens=False)["input_ids"]
        encoded = self._processor(
            text=[text], images=[self._open(images)], add_special_tokens=False, return_tensors="pt"
        )
        self._keep(images, _pixels(encoded))
        return cast(list[int], encoded["input_ids"][0].tolist())

    def pixels(self, images: Images) -> Pixels:
        """Of all pictures of a prompt, hidden as `images.mask` says. Raises ImageError with its id."""
        key = images.sources, images.mask
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        try:
            pictures = self._open(images)
        except ImageError as error:
            raise ImageError(f"{images.prompt_id}: {error}") from None
        pixels = _pixels(self._processor.image_processor([pictures], return_tensors="pt"))
        self._keep(images, pixels)
        return pixels

    def inputs(self, images: Images, token_ids: Sequence[int]) -> dict[str, Tensor]:
        """What `model(input_ids=...)` takes beside the ids of one prompt, a row of each."""
        tensors = dict(self.pixels(images).tensors)
        if self.has_axes:
            ids = torch.tensor([list(token_ids)])
            tensors["mm_token_type_ids"] = (ids == self.image_token_id).long()
        return tensors

    def save_pretrained(self, save_directory: str) -> None:
        """The files that this processor was made from, beside those of the tokenizer."""
        cast(Any, self.tokenizer).save_pretrained(save_directory)
        for name in FILES:
            file = _transformers.utils.cached_file(
                local_or_hub(self.path), name, _raise_exceptions_for_missing_entries=False
            )
            if file is not None:
                (Path(save_directory) / name).write_bytes(Path(file).read_bytes())

    def _open(self, images: Images) -> list[pil.Image]:
        pictures = [open_picture(source) for source in images.sources]
        if images.mask is None:
            return pictures
        return [masked(self._as_seen(p), images.mask, number=i) for i, p in enumerate(pictures)]

    def _as_seen(self, picture: pil.Image) -> pil.Image:
        """In the size the model's processor brings it to, where that is one size for the whole picture.

        So patches of the mask are those of the model, and do not blur away when a large picture shrinks.
        """
        processor = self._processor.image_processor
        if not self.has_axes:
            return picture
        grid = processor([picture], return_tensors="pt")["image_grid_thw"][0].tolist()
        height, width = (int(n) * int(processor.patch_size) for n in grid[1:])
        return picture.resize((width, height), pil.Resampling(int(processor.resample)))

    def _keep(self, images: Images, pixels: Pixels) -> None:
        key = images.sources, images.mask
        if key in self._kept:
            return
        self._kept[key] = pixels
        self._room -= pixels.size
        while self._room < 0 and len(self._kept) > 1:
            self._room += self._kept.popitem(last=False)[1].size


def load_processor(path: str, tokenizer: PreTrainedTokenizerBase) -> Processor | None:
    """None: the model has no eyes. Raises ModelError: its kind is not known, or it has no processor."""
    config: Any = load_model_config(path)
    if "vision_config" not in config.to_dict():
        return None
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{path} takes pictures, but is a {config.model_type}; of models that do, there are "
            f"{', '.join(FAMILIES)}"
        )
    return Processor(path, tokenizer)


def _pixels(encoded: Mapping[str, Any]) -> Pixels:
    wanted = ("pixel_values", "image_grid_thw", "pixel_attention_mask")
    return Pixels({name: encoded[name] for name in wanted if name in encoded})


def _load(path: str, family: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    place = local_or_hub(path)
    kind: Any = getattr(_transformers, FAMILIES[family])

    class ForPictures(kind):
        """Its class refuses to be made without a video processor, which needs torchvision."""

        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
            return type(argument)

    settings: dict[str, Any] = {}
    with suppress(OSError):
        settings = kind.get_processor_dict(place)[0]
    try:
        image_processor = _transformers.AutoImageProcessor.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} has no processor for pictures that can be loaded: {error}") from None
    own = {key: settings[key] for key in ("image_seq_len", "chat_template") if settings.get(key) is not None}
    parts = {"image_processor": image_processor, "tokenizer": tokenizer, "video_processor": None}
    try:
        return ForPictures(**{k: v for k, v in parts.items() if k in kind.get_attributes()}, **own)
    except ImportError as error:
        raise ModelError(f"the processor of {path} cannot be made: {error}") from None
