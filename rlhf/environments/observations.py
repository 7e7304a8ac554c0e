"""What an environment says, as messages: results of tools as text or parts, images as PNG, no endless texts.

TRL writes `str(result)` and verl at most 256 characters by default; here a text is as long as it is, up to
LONGEST. How many tokens of it there is room for is decided by the loop of episodes
(`rollout.max_completion_tokens`).
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

LONGEST = 100_000
"""Characters of one text of an environment that are kept; the rest is cut off, which the text then says."""
PNG = b"\x89PNG\r\n\x1a\n"
ROLES = ("user", "tool", "system", "assistant")


class WrongAnswer(TypeError):
    """An environment returned something that is no message, no reward, or too large. The episode is lost."""


class Texts:
    """Makes texts that can be sent and shown of those of an environment; counts those that it cuts."""

    def __init__(self) -> None:
        self.truncated = 0

    def of(self, text: str) -> str:
        """The text as valid Unicode of at most LONGEST characters."""
        if len(text) > LONGEST:
            self.truncated += 1
            text = f"{text[:LONGEST]}\n[{len(text) - LONGEST} more characters are left out]"
        if text.isascii():
            return text
        # pairs of surrogates become the character that they mean, lone ones the replacement character
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def of_result(self, result: object) -> str | list[dict[str, Any]]:
        """The result of a tool as content of a message. TypeError for what is neither text nor JSON."""
        if isinstance(result, str):
            return self.of(result)
        if isinstance(result, bytes):
            return self.of(result.decode(errors="replace"))
        if _is_image(result):
            return [{"type": "image", "image": png_of(result)}]
        if _are_parts(result):
            return self.of_parts(cast(Sequence[Any], result))
        if inspect.isgenerator(result) or inspect.isasyncgen(result):
            raise TypeError("the tool returned a generator: it must return the result itself")
        return self.of(json.dumps(result, ensure_ascii=False, default=plain))

    def of_parts(self, parts: Sequence[Any]) -> list[dict[str, Any]]:
        """The parts of a content: texts, and images as the bytes of a PNG. Raises WrongAnswer."""
        return [self._part(part) for part in parts]

    def _part(self, part: Any) -> dict[str, Any]:
        match part:
            case {"type": "text", "text": str(text)}:
                return {"type": "text", "text": self.of(text)}
            case {"type": "image", "image": image}:
                return {"type": "image", "image": png_of(image)}
            case _:
                raise WrongAnswer(
                    'a part of a content must be {"type": "text", "text": ...} or '
                    f'{{"type": "image", "image": ...}}, got {part!r:.80}'
                )

    def messages(self, value: object, what: str) -> list[dict[str, Any]]:
        """What `reset` or `respond` returned, as messages. Raises WrongAnswer, which names it `what`.

        A text or parts are one message of the user; a message, or a list of them, is taken as it is.
        """
        if value is None:
            return []
        if isinstance(value, str):
            return [{"role": "user", "content": self.of(value)}]
        if isinstance(value, Mapping):
            return [self._message(cast(Mapping[str, Any], value), what)]
        if _is_image(value):
            return [{"role": "user", "content": self.of_result(value)}]
        if isinstance(value, list | tuple):
            entries = cast(Sequence[Any], value)
            if _are_parts(entries):
                return [{"role": "user", "content": self.of_parts(entries)}]
            return [self._message(entry, what) for entry in entries]
        raise WrongAnswer(
            f"{what} must return a text, messages, parts of a message or None, "
            f"got {type(value).__name__} {value!r:.80}"
        )

    def _message(self, message: Any, what: str) -> dict[str, Any]:
        if not isinstance(message, Mapping) and hasattr(message, "model_dump"):
            message = message.model_dump(exclude_none=True)
        if not isinstance(message, Mapping):
            raise WrongAnswer(f"{what} must return messages, got {message!r:.80}")
        fields = dict(cast(Mapping[str, Any], message))
        role, content = fields.get("role"), fields.get("content")
        if role not in ROLES:
            raise WrongAnswer(
                f"the role of a message of {what} must be one of {', '.join(ROLES)}, got {role!r:.80}"
            )
        if isinstance(content, str):
            fields["content"] = self.of(content)
        elif isinstance(content, list | tuple):
            fields["content"] = self.of_parts(cast(Sequence[Any], content))
        else:
            raise WrongAnswer(
                f"the content of a message of {what} must be text or parts, got {content!r:.80}"
            )
        return fields


def plain(value: Any) -> Any:
    """What JSON can hold of arrays, dataclasses, models of pydantic and sets. TypeError for the rest."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "model_dump"):
        return value.model_dump()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(cast(set[Any], value))
    raise TypeError(f"{type(value).__name__} is neither text nor JSON: return one of them")


def png_of(image: Any) -> bytes:
    """An image of PIL, the path or the bytes of a file, as a PNG. Raises WrongAnswer for anything else."""
    if isinstance(image, bytes) and image.startswith(PNG):
        return image
    from PIL import Image

    if isinstance(image, bytes | str | os.PathLike):
        source: Any = io.BytesIO(image) if isinstance(image, bytes) else cast(Any, image)
        try:
            with Image.open(source) as opened:
                return _encoded(opened)
        except OSError as error:
            raise WrongAnswer(f"the image {image!r:.80} cannot be read: {error}") from None
    if not isinstance(image, Image.Image):
        raise WrongAnswer(
            "an image must be one of PIL, a path or the bytes of a file, "
            f"got {type(image).__name__} {image!r:.80}"
        )
    return _encoded(image)


def _encoded(image: Any) -> bytes:
    written = io.BytesIO()
    image.save(written, "PNG")
    return written.getvalue()


def _is_image(value: object) -> bool:
    # whoever has an image of PIL has imported it; another thread may be importing it right now
    image: Any = getattr(sys.modules.get("PIL.Image"), "Image", None)
    return image is not None and isinstance(value, image)


def _are_parts(value: object) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    parts = [cast(dict[str, Any], part) for part in cast(Sequence[Any], value) if isinstance(part, dict)]
    return len(parts) == len(cast(Sequence[Any], value)) and all(
        p.get("type") in ("text", "image") for p in parts
    )
