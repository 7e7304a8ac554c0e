"""A model's own image processor: messages with images -> token ids, images -> inputs of the vision tower.

Only the parts for images are loaded, not those for video; where torchvision is not installed, the PIL back
end is used.
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
from PIL import Image as pil
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.models.chat import write_chat
from rlhf.models.pretrained import ModelError, load_model_config, local_or_hub
from rlhf.models.vision.images import ImageError, open_picture, separate_pictures
from rlhf.models.vision.masking import mask_patches
from rlhf.models.vision.text_alone import FAMILIES, takes_images, text_alone
from rlhf.types import Image, Images

CACHE_BYTES = 256 << 20
"""Memory for processed images that are kept for the next pass."""
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
    """Inputs of the vision tower for the images of one prompt, by the names of the model's arguments."""

    tensors: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Processor:
    """The processor of one model. Images are processed when they are needed; recently used ones are kept."""

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
        """Whether positions have three axes: time, height and width (mrope)."""
        return self.family.startswith("qwen")

    @property
    def placeholder(self) -> str:
        """The text that stands for an image in a prompt."""
        return cast(str, self._processor.image_token)

    @property
    def chat_template(self) -> Any:
        """The template that writes messages with images."""
        return self._processor.chat_template

    @chat_template.setter
    def chat_template(self, template: Any) -> None:
        self._processor.chat_template = template

    def prompt(
        self,
        prompt_id: str,
        messages: Sequence[Mapping[str, Any]],
        column: object,
        folder: Path,
        *,
        tools: list[dict[str, Any]] | None = None,
    ) -> tuple[list[dict[str, Any]], tuple[Image, ...], list[int]]:
        """Messages of a dataset -> messages with `{"type": "image"}` for images, the images, token ids.

        `column`: images that the dataset has beside the messages. Raises ImageError: an image cannot be read
        or does not fit the messages (images.py); ChatError as `write_chat` does.
        """
        written, sources = separate_pictures(messages, column, folder)
        text = write_chat(self.tokenizer, written, tools=tools, template=self._processor.chat_template)
        return written, sources, self.token_ids(text, Images(prompt_id, sources))

    def token_ids(self, text: str, images: Images) -> list[int]:
        """Token ids of `text`, with each placeholder repeated once per feature of its image.

        Raises ImageError: an image cannot be read, or there are more or fewer placeholders than images.
        """
        marks, count = text.count(self.placeholder), len(images.sources)
        if marks != count:
            raise ImageError(f"its text has {marks} placeholders for {count} images")
        if not count:
            return cast(Any, self.tokenizer)(text, add_special_tokens=False)["input_ids"]
        encoded = self._processor(
            text=[text], images=[self._open(images)], add_special_tokens=False, return_tensors="pt"
        )
        self._keep(images, _pixels(encoded))
        return cast(list[int], encoded["input_ids"][0].tolist())

    def pixels(self, images: Images) -> Pixels:
        """Inputs of the vision tower for all images of a prompt, masked as `images.mask` says.

        Raises ImageError, with the prompt's id: an image cannot be read.
        """
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
        """The further arguments of `model(input_ids=...)` for one prompt, as batches of one row."""
        tensors = dict(self.pixels(images).tensors)
        if self.has_axes:
            ids = torch.tensor([list(token_ids)])
            kinds = (ids == self.image_token_id).long()
            if images.places is not None:
                kinds = torch.zeros_like(ids).index_fill(1, torch.tensor(images.places), 1)
            tensors["mm_token_type_ids"] = kinds
        return tensors

    def save_pretrained(self, save_directory: str) -> None:
        """Writes the files of the tokenizer and copies those that this processor was made from."""
        Reader(self.path, self.tokenizer).save_pretrained(save_directory)

    def _open(self, images: Images) -> list[pil.Image]:
        pictures = [open_picture(source) for source in images.sources]
        if images.mask is None:
            return pictures
        return [mask_patches(self._resized(p), images.mask, number=i) for i, p in enumerate(pictures)]

    def _resized(self, picture: pil.Image) -> pil.Image:
        """The image in the size that the model's processor gives it, so that masked patches stay sharp.

        Masking a large image before it shrinks would blur the patches. A processor that cuts an image into
        tiles has no single size; its images are masked in their own size.
        """
        processor = self._processor.image_processor
        if not self.has_axes:
            return picture
        grid = processor([picture], return_tensors="pt")["image_grid_thw"][0].tolist()
        height, width = (int(n) * int(processor.patch_size) for n in grid[1:])
        return picture.resize((width, height), pil.Resampling(int(processor.resample)))

    def _keep(self, images: Images, pixels: Pixels) -> None:
        """Adds to the cache, and drops what was not used for longest while it is over `CACHE_BYTES`."""
        key = images.sources, images.mask
        if key in self._kept:
            return
        self._kept[key] = pixels
        self._room -= pixels.size
        while self._room < 0 and len(self._kept) > 1:
            self._room += self._kept.popitem(last=False)[1].size


@dataclass(frozen=True, slots=True)
class Reader:
    """Writes everything that turns prompts into inputs of the model at `path`."""

    path: str
    tokenizer: PreTrainedTokenizerBase

    def save_pretrained(self, save_directory: str) -> None:
        """Writes the files of the tokenizer, and copies those of the model's processor, if it has one."""
        cast(Any, self.tokenizer).save_pretrained(save_directory)
        for name in FILES if takes_images(load_model_config(self.path)) else ():
            file = _transformers.utils.cached_file(
                local_or_hub(self.path), name, _raise_exceptions_for_missing_entries=False
            )
            if file is not None:
                (Path(save_directory) / name).write_bytes(Path(file).read_bytes())


def load_processor(path: str, tokenizer: PreTrainedTokenizerBase) -> Processor | None:
    """The processor of the model at `path`; None for one that is given text alone.

    That is a model without a vision tower, or one of a kind that is not in `FAMILIES`. Raises ModelError: its
    processor cannot be loaded.
    """
    config: Any = load_model_config(path)
    return Processor(path, tokenizer) if takes_images(config) and not text_alone(config) else None


def _pixels(encoded: Mapping[str, Any]) -> Pixels:
    wanted = ("pixel_values", "image_grid_thw", "pixel_attention_mask")
    return Pixels({name: encoded[name] for name in wanted if name in encoded})


def _load(path: str, family: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    place = local_or_hub(path)
    kind: Any = getattr(_transformers, FAMILIES[family])

    class ForImages(kind):
        """Accepts None for the video processor, which would need torchvision."""

        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
            return type(argument)

    settings: dict[str, Any] = {}
    with suppress(OSError):
        settings = kind.get_processor_dict(place)[0]
    try:
        image_processor = _transformers.AutoImageProcessor.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} has no image processor that can be loaded: {error}") from None
    own = {key: settings[key] for key in ("image_seq_len", "chat_template") if settings.get(key) is not None}
    parts = {"image_processor": image_processor, "tokenizer": tokenizer, "video_processor": None}
    try:
        return ForImages(**{k: v for k, v in parts.items() if k in kind.get_attributes()}, **own)
    except ImportError as error:
        raise ModelError(f"the processor of {path} cannot be made: {error}") from None
