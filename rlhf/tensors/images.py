"""Images of prompts and of what environments answer, and where they stand. Imports nothing of ours."""

from __future__ import annotations

from dataclasses import dataclass

Image = str | bytes
"""An image: the absolute path of its file, or the bytes of such a file."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Squares of `patch` x `patch` pixels, each made black with probability `ratio`, by `seed` (PAPO)."""

    patch: int
    ratio: float
    seed: int


@dataclass(frozen=True, slots=True)
class Images:
    """The images of one prompt or observation, in the order of their placeholders.

    `mask` hides some patches of them.
    """

    prompt_id: str
    sources: tuple[Image, ...]
    mask: Mask | None = None
    places: tuple[int, ...] | None = None
    """Where the placeholders stand among the prompt's tokens. None: they are all placeholders that it has."""


@dataclass(frozen=True, slots=True)
class Observed:
    """Tokens `[start, end)` of a trajectory are an observation with images.

    Its placeholders belong to them; one that the policy wrote outside such tokens is a token like any other.
    """

    start: int
    end: int
    images: Images
