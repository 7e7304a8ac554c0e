"""Which earlier tokens a layer sees in a packed forward: all of its sequence, or those of a sliding window.

transformers describes the mask of each layer by a function of two positions, and a registered function makes
the mask from it. For packed groups no mask is made: `packed_mask` finds out which of the two the mask would
be, and passes a window to the attention function as a tensor of one number in the mask's place. The window
that a layer passes to its attention by a keyword is not used, because not all do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import transformers
from torch import Tensor

FAR = 1 << 20
"""A position beyond those of any sequence."""
OTHERS = -1
"""In the place of a window: the mask is neither causal nor a sliding window."""


def register_mask(name: str) -> None:
    """Has masks for the registered attention `name` made by `packed_mask`."""
    # its annotations are too incomplete for a strict check
    cast(Any, transformers).AttentionMaskInterface.register(name, packed_mask)


def packed_mask(
    *, mask_function: Callable[..., Any], local_size: int | None = None, **_: Any
) -> Tensor | None:
    """None for a causal mask, else what `window_of` reads; called by transformers for each kind of layer.

    `mask_function(batch, head, query, key)` says which queries see which keys: all earlier ones, those of a
    sliding window of `local_size` tokens, or others.
    """
    for window in (None, local_size):
        if _agrees(mask_function, window):
            return None if window is None else _number(window)
    # perhaps no layer uses it
    return _number(OTHERS)


def window_of(mask: Tensor | None) -> int | None:
    """The window that `packed_mask` has put in the place of a mask; None: all earlier tokens.

    Raises NotImplementedError: the layer has another mask.
    """
    if mask is None:
        return None
    if mask.numel() != 1 or mask.dtype != torch.int64 or int(mask) == OTHERS:
        raise NotImplementedError("its attention has a mask that is neither causal nor a sliding window")
    return int(mask)


def _agrees(mask_function: Callable[..., Any], window: int | None) -> bool:
    """Whether a mask is causal with that window, at pairs of positions around its borders."""
    reach = FAR if window is None else window
    pairs = [(3, 3), (3, 4), (0, FAR), (FAR, FAR), (FAR, 0)]
    for query in (reach, reach + 5, 2 * reach):
        pairs += [(query, query - distance) for distance in (1, reach - 1, reach)]
    seen = [key <= query and (window is None or query - key < window) for query, key in pairs]
    queries, keys = torch.tensor(pairs).T
    zeros = torch.zeros_like(queries)
    try:
        found = mask_function(zeros, zeros, queries, keys)
    except (IndexError, RuntimeError):
        # it looks positions up in a tensor, which has not so many, or is on another device
        return False
    return torch.equal(torch.as_tensor(found).expand_as(queries), torch.tensor(seen))


@cache
def _number(window: int) -> Tensor:
    """A tensor of the shape of a mask."""
    return torch.full((1, 1, 1, 1), window)
