"""A tool that looks closer: the prompt has a small picture, `crop` shows a part of the large one."""

from __future__ import annotations

from typing import Any

from PIL import Image

LARGEST = 448
"""Most pixels of a side of what is shown."""


class Crop:
    """The column `large` of a line is the path of its large picture."""

    def reset(self, large: str) -> None:
        """Opens the picture of this line."""
        self._picture = Image.open(large).convert("RGB")
        self.box: list[float] | None = None

    def crop(self, x1: float, y1: float, x2: float, y2: float) -> list[dict[str, Any]]:
        """Shows a part of the picture in full resolution.

        Args:
            x1: The left edge, from 0 (left of the picture) to 1 (right of it).
            y1: The upper edge, from 0 (top) to 1 (bottom).
            x2: The right edge, more than x1.
            y2: The lower edge, more than y1.
        """
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
            raise ValueError("expected 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1")
        self.box = [x1, y1, x2, y2]
        width, height = self._picture.size
        edges = (round(x1 * width), round(y1 * height), round(x2 * width), round(y2 * height))
        part = self._picture.crop((*edges[:2], max(edges[2], edges[0] + 1), max(edges[3], edges[1] + 1)))
        part.thumbnail((LARGEST, LARGEST))
        return [{"type": "image", "image": part}, {"type": "text", "text": "the part that you asked for"}]
