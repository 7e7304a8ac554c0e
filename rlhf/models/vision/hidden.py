"""Hides tokens of a prompt from attention, so that a model sees less of an image or nothing of it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@contextmanager
def hidden_from_attention(model: PreTrainedModel, places: Sequence[int]) -> Generator[None]:
    """While it lasts, no token of the language model attends to those at `places` of any row.

    Rows are sequences without padding, in one pass or token by token with a cache. The positions of all
    tokens stay those of the whole prompt, which the attention mask of `generate` would move. A hidden token
    still has a state of its own, which nothing reads. The size of an image shows in the number of its tokens.
    """
    if not places:
        yield
        return
    whole: Any = model
    index = torch.tensor(places)

    def hide(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tokens = kwargs.get("inputs_embeds")
        tokens = kwargs["input_ids"] if tokens is None else tokens
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        length = tokens.shape[1] + (0 if cache is None else cache.get_seq_length())
        if mask is None:
            mask = torch.ones(tokens.shape[0], length, dtype=torch.long, device=tokens.device)
        # where a later version of transformers gives another mask, hiding must not fail in silence
        assert isinstance(mask, Tensor) and mask.shape == (tokens.shape[0], length), type(mask)
        return args, {**kwargs, "attention_mask": mask.index_fill(1, index.to(mask.device), 0)}

    handle = whole.get_decoder().register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
