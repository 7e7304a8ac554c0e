"""Pictures: where a dataset keeps them, what of a chat message they are, and hiding parts of one.

A picture is given as a path (from the dataset's folder on), as the bytes of a file, as a PIL image, or as the
`{"bytes": ..., "path": ...}` of the `datasets` library. It stands in the chat messages

    {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What?"}]}

or in a column of its own, in the order of the `{"type": "image"}` parts or `<image>` marks of the messages;
without either, before the text of the first message of the user. From here on it is an absolute path or the
bytes of a file, and messages have `{"type": "image"}` where one stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image as pil
from PIL import UnidentifiedImageError

from rlhf.types import Image, Mask

MARK = "<image>"
Message = Mapping[str, Any]


class ImageError(ValueError):
    """A picture cannot be read, or does not fit its prompt. The message names the sample."""


def of_text(messages: Sequence[Message]) -> list[Message]:
    """Messages for a chat template of text: parts that are all text stand end to end in their place."""
    return [
        {**message, "content": "".join(part["text"] for part in message["content"])}
        if not isinstance(message["content"], str)
        and all(part.get("type") == "text" for part in message["content"])
        else message
        for message in messages
    ]


def open_picture(image: Image) -> pil.Image:
    """In RGB, decoded to the end. Raises ImageError."""
    name = image if isinstance(image, str) else f"a picture of {len(image)} bytes"
    try:
        with pil.open(image if isinstance(image, str) else BytesIO(image)) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise ImageError(f"there is no picture {name}") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is no picture that Pillow can read") from None
    except (OSError, ValueError, pil.DecompressionBombError) as error:
        raise ImageError(f"{name} cannot be read: {error}") from None


def masked(picture: pil.Image, mask: Mask, *, number: int) -> pil.Image:
    """Each square of `mask.patch` pixels is made black with probability `mask.ratio`, whatever it shows.

    `number`: which of a prompt's pictures it is; each has a draw of its own.
    """
    pixels = np.array(picture)
    rows, columns = (-(-size // mask.patch) for size in pixels.shape[:2])
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence([mask.seed, number])))
    hidden = draw.random((rows, columns)) < mask.ratio
    whole = hidden.repeat(mask.patch, 0).repeat(mask.patch, 1)[: pixels.shape[0], : pixels.shape[1]]
    pixels[whole] = 0
    return pil.fromarray(pixels)


def noise(width: int, height: int, seed: int) -> Image:
    """A picture of random pixels."""
    pixels = np.random.Generator(np.random.Philox(seed)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return stored(pil.fromarray(pixels), Path())


def stored(value: object, folder: Path) -> Image:
    """A picture as a dataset gives it -> an absolute path, or the bytes of a file. Raises ImageError."""
    if isinstance(value, Mapping):
        parts = cast(Mapping[str, object], value)
        held = parts.get("bytes")
        value = held if held is not None else parts.get("path")
    if isinstance(value, str) and value:
        return str((folder / Path(value.removeprefix("file://")).expanduser()).absolute())
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, pil.Image):
        file = BytesIO()
        value.convert("RGB").save(file, "PNG")
        return file.getvalue()
    raise ImageError(f"a picture is a path, bytes or a PIL image, got {value!r:.80}")


def separate_pictures(
    messages: Sequence[Message], column: object, folder: Path
) -> tuple[list[dict[str, Any]], tuple[Image, ...]]:
    """Messages whose pictures are taken out and marked, and those pictures; `column` holds more of them.

    Raises ImageError: there are more pictures than places for them, or the other way round.
    """
    loose = [] if column is None else [stored(value, folder) for value in _listed(column)]
    waiting = iter(loose)
    found: list[Image] = []
    written: list[dict[str, Any]] = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in _parts(message["content"], marks=bool(loose)):
            if part["type"] == "image":
                given = part.get("image", part.get("path"))
                picture = next(waiting, None) if given is None else stored(given, folder)
                if picture is None:
                    raise ImageError(f"the messages have places for more than {len(loose)} pictures")
                found.append(picture)
                parts.append({"type": "image"})
            else:
                parts.append({"type": "text", "text": part["text"]})
        written.append({**message, "content": parts})
    rest = list(waiting)
    if rest and not found:
        first = next((m for m in written if m["role"] == "user"), written[0])
        first["content"] = [*({"type": "image"} for _ in rest), *first["content"]]
        return written, tuple(rest)
    if rest:
        raise ImageError(f"the messages have no place for {len(rest)} of the {len(loose)} pictures given")
    return written, tuple(found)


def has_pictures(messages: object) -> bool:
    """Whether chat messages hold a picture themselves."""
    if not isinstance(messages, list):
        return False
    contents = [m["content"] for m in cast(list[Message], messages)]
    return any(part["type"] == "image" for c in contents if not isinstance(c, str) for part in c)


def _listed(column: object) -> Sequence[object]:
    return cast(Sequence[object], column) if isinstance(column, list | tuple) else [column]


def _parts(content: object, *, marks: bool) -> Iterator[dict[str, Any]]:
    """The parts of a message; text with marks is cut at them if it has pictures to go with."""
    if not isinstance(content, str):
        yield from (dict(part) for part in cast(Sequence[Message], content))
        return
    pieces = content.split(MARK) if marks else [content]
    for number, piece in enumerate(pieces):
        if number:
            yield {"type": "image"}
        if piece or len(pieces) == 1:
            yield {"type": "text", "text": piece}
