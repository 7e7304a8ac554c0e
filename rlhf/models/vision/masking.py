"""Hides part of an image: the patches that are blackened for the masked passes of PAPO."""

from __future__ import annotations

import numpy as np
from PIL import Image as pil

from rlhf.types import Mask


def mask_patches(picture: pil.Image, mask: Mask, *, number: int) -> pil.Image:
    """Makes each square of `mask.patch` x `mask.patch` pixels black with probability `mask.ratio`.

    `number`: the index of the image among those of its prompt, so that each has its own random numbers.
    """
    pixels = np.array(picture)
    # the last square of a row or column may be cut off
    rows, columns = (-(-size // mask.patch) for size in pixels.shape[:2])
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence([mask.seed, number])))
    hidden = draw.random((rows, columns)) < mask.ratio
    whole = hidden.repeat(mask.patch, 0).repeat(mask.patch, 1)[: pixels.shape[0], : pixels.shape[1]]
    pixels[whole] = 0
    return pil.fromarray(pixels)
