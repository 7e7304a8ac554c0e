"""Images of a dataset: finds them in columns and chat messages, opens them, and masks patches of them.

An image is given as a path (relative to the dataset's folder), as the bytes of a file, as a PIL image, or as
the `{"bytes": ..., "path": ...}` of the `datasets` library. It stands in the chat messages

    {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What?"}]}

or in a column of its own, in the order of the `{"type": "image"}` parts or `<image>` marks of the messages.
If the messages have neither, the images come before the text of the user's first message. In the rest of the
project an image is an absolute path or the bytes of a file, and messages have `{"type": "image"}` in its
place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image as pil
from PIL import UnidentifiedImageError

from rlhf.types import Image

MARK = "<image>"
Message = Mapping[str, Any]


class ImageError(ValueError):
    """An image cannot be read, or does not fit its prompt. The message names the image or the prompt."""


def open_picture(image: Image) -> pil.Image:
    """The image in RGB, completely decoded. Raises ImageError: there is no such file, or it is no image."""
    name = image if isinstance(image, str) else f"an image of {len(image)} bytes"
    try:
        with pil.open(image if isinstance(image, str) else BytesIO(image)) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise ImageError(f"there is no image {name}") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is no image that Pillow can read") from None
    except (OSError, ValueError, pil.DecompressionBombError) as error:
        raise ImageError(f"{name} cannot be read: {error}") from None


def noise(width: int, height: int, seed: int) -> Image:
    """An image of random pixels."""
    pixels = np.random.Generator(np.random.Philox(seed)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return stored(pil.fromarray(pixels), Path())


def stored(value: object, folder: Path) -> Image:
    """An image as a dataset gives it -> an absolute path, or the bytes of a file.

    Raises ImageError: `value` is none of the forms above.
    """
    if isinstance(value, Mapping):
        entries = cast(Mapping[str, object], value)
        content = entries.get("bytes")
        value = content if content is not None else entries.get("path")
    if isinstance(value, str) and value:
        return str((folder / Path(value.removeprefix("file://")).expanduser()).absolute())
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, pil.Image):
        file = BytesIO()
        value.convert("RGB").save(file, "PNG")
        return file.getvalue()
    raise ImageError(f"an image is a path, bytes or a PIL image, got {value!r:.80}")


def separate_pictures(
    messages: Sequence[Message], column: object, folder: Path
) -> tuple[list[dict[str, Any]], tuple[Image, ...]]:
    """Takes images out of chat messages: returns messages with `{"type": "image"}` for them, and the images.

    `column`: images that the dataset has beside the messages, or None. Raises ImageError: there are more
    images than places for them, or more places than images.
    """
    in_column = [] if column is None else [stored(value, folder) for value in _listed(column)]
    waiting = iter(in_column)
    found: list[Image] = []
    written: list[dict[str, Any]] = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in _parts(message["content"], marks=bool(in_column)):
            if part["type"] == "image":
                given = part.get("image", part.get("path"))
                picture = next(waiting, None) if given is None else stored(given, folder)
                if picture is None:
                    raise ImageError(f"the messages have places for more than {len(in_column)} images")
                found.append(picture)
                parts.append({"type": "image"})
            else:
                parts.append({"type": "text", "text": part["text"]})
        written.append({**message, "content": parts})
    rest = list(waiting)
    # no message has a place for an image: they come before the text of the user's first message
    if rest and not found:
        first = next((m for m in written if m["role"] == "user"), written[0])
        first["content"] = [*({"type": "image"} for _ in rest), *first["content"]]
        return written, tuple(rest)
    if rest:
        raise ImageError(f"the messages have no place for {len(rest)} of the {len(in_column)} images given")
    return written, tuple(found)


def has_pictures(messages: object) -> bool:
    """Whether chat messages contain images (a column beside them does not count)."""
    if not isinstance(messages, list):
        return False
    contents = [m["content"] for m in cast(list[Message], messages)]
    return any(part["type"] == "image" for c in contents if not isinstance(c, str) for part in c)


def _listed(column: object) -> Sequence[object]:
    return cast(Sequence[object], column) if isinstance(column, list | tuple) else [column]


def _parts(content: object, *, marks: bool) -> Iterator[dict[str, Any]]:
    """The parts of a message; with `marks`, each `<image>` within a string becomes an image part."""
    if not isinstance(content, str):
        yield from (dict(part) for part in cast(Sequence[Message], content))
        return
    pieces = content.split(MARK) if marks else [content]
    for number, piece in enumerate(pieces):
        if number:
            yield {"type": "image"}
        if piece or len(pieces) == 1:
            yield {"type": "text", "text": piece}
