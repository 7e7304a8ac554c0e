"""Key-value cache of the native engine: each prompt stored once, shared by the rows that continue it.

    prefix   per layer  [P, Hk, L, D]   an entry per prompt, right-padded to the longest
    suffix   per layer  [S, Hk, T, D]   an entry per row, right-padded to the longest

P prompts, S rows, Hk heads of keys, L tokens of the longest prompt, T tokens of the longest row, D head size;
biases mask the padding. The suffix grows with the tokens. The rows that are decoded stand before those that
wait to be continued, and so do their prompts: an entry that leaves its place is replaced by another. The
storage is halved when half of it is unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from rlhf.kernels.attention_parts import attend, merge

CHUNK = 64


def arranged(*parts: Sequence[int]) -> list[int]:
    """The old indices of entries in a new order: part after part, with as few entries moved as possible.

    `arranged([0, 2, 4]) == [0, 4, 2]`, `arranged([0, 2], [1, 3]) == [0, 2, 1, 3]`
    """
    order: list[int] = []
    for part in parts:
        places, entries = range(len(order), len(order) + len(part)), set(part)
        movers = (i for i in part if i not in places)
        order += [i if i in entries else next(movers) for i in places]
    return order


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which queries of the rows that get one token attend to which prompt."""

    slots: Int64[Tensor, " N"]
    """`[P * Hk * G]` indices into queries viewed as `[S * Hk, repeats * D]`; smaller groups are padded."""
    places: Int64[Tensor, " S"]
    """The place of each row among `[P, G]`."""
    bias: Tensor | None
    """`[P, 1, 1, L]`, for the padding of prompts."""


@dataclass(frozen=True, slots=True)
class _Step:
    """Where the tokens of one step go, for the rows that get one."""

    rows: Int64[Tensor, " S"]
    lengths: Int64[Tensor, " S"]
    end: int
    """The most tokens that a row has with the new one."""
    bias: Tensor | None
    """`[S, 1, 1, end]`, for the padding of rows."""


class SharedPrefixCache:
    """Cache of several prompts and their rows, filled by one or more `Prefill`, then a `Decode` per step.

    It may grow to `reserved_tokens` times `bytes_per_token` bytes.
    """

    def __init__(self, prompt_lengths: Sequence[int], group_sizes: Sequence[int], max_tokens: int) -> None:
        self.prompt_lengths = list(prompt_lengths)
        self.owner = [p for p, size in enumerate(group_sizes) for _ in range(size)]
        """Index of the prompt of each row, `[S]`."""
        self.lengths = [0] * len(self.owner)
        """Number of tokens behind its prompt that are stored of each row, `[S]`."""
        self.decoded = len(self.owner)
        """How many rows are decoded: the first ones. Those behind them wait to be continued."""
        self.joining: list[int] = []
        """How many new tokens the last of the decoded rows bring in the next step; the others bring one."""
        self.max_tokens = max_tokens
        """The most tokens of a row behind its prompt."""
        self._prompts_decoded = len(self.prompt_lengths)
        self._prefix: list[tuple[Tensor, Tensor]] = []
        self._suffix: list[tuple[Tensor, Tensor]] = []
        self._layout: _Layout | None = None
        self._step: _Step | None = None

    @property
    def longest(self) -> int:
        """The most tokens that a prompt and its continuation may have together."""
        return max(self.prompt_lengths) + self.max_tokens

    @property
    def reserved_tokens(self) -> int:
        prefix, suffix = self._prefix[0][0], self._suffix[0][0]
        return prefix.shape[0] * prefix.shape[2] + suffix.shape[0] * self.max_tokens

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(x.shape[1] * x.shape[3] * x.itemsize for pair in self._prefix for x in pair)

    @property
    def new_tokens(self) -> list[int]:
        """How many tokens each decoded row gets in the next step."""
        return [1] * (self.decoded - len(self.joining)) + self.joining

    def known(self, row: int) -> int:
        """The number of tokens of a row whose keys and values are stored, with its prompt."""
        return self.prompt_lengths[self.owner[row]] + self.lengths[row]

    def store_prompt(self, layer: int, prompt: int, key: Tensor, value: Tensor) -> None:
        """Stores all keys and values `[Hk, L, D]` of one prompt at one layer; layers must come in order."""
        if layer == len(self._prefix):
            self._prefix.append((self._new_prefix(key), self._new_prefix(value)))
            self._suffix.append((self._new_suffix(key), self._new_suffix(value)))
        for stored, new in zip(self._prefix[layer], (key, value), strict=True):
            stored[prompt, :, : new.shape[1]] = new

    # zeros, since the weight 0 of a masked key times uninitialised NaN would be NaN

    def _new_prefix(self, like: Tensor) -> Tensor:
        return like.new_zeros(
            len(self.prompt_lengths), like.shape[0], max(self.prompt_lengths), like.shape[2]
        )

    def _new_suffix(self, like: Tensor) -> Tensor:
        return like.new_zeros(len(self.owner), like.shape[0], min(CHUNK, self.max_tokens), like.shape[2])

    def begin_step(self) -> None:
        """Makes room for the new tokens of every decoded row; call before each `Decode`."""
        needed = max(a + b for a, b in zip(self.lengths, self.new_tokens, strict=False))
        key = self._suffix[0][0]
        if needed > key.shape[2]:
            self._suffix = [(self._grown(k, needed), self._grown(v, needed)) for k, v in self._suffix]
        if self._layout is None:
            self._layout = self._laid_out(key)
        lengths = self.lengths[: self.decoded - len(self.joining)]
        at = torch.tensor(lengths, dtype=torch.int64, device=key.device)
        end, bias = max(lengths, default=0) + 1, None
        if len(set(lengths)) > 1:
            bias = _bias(at + 1, end, key.dtype)
        self._step = _Step(torch.arange(len(lengths), device=key.device), at, end, bias)

    def _grown(self, stored: Tensor, needed: int) -> Tensor:
        _, heads, capacity, dim = stored.shape
        rows = len(self.owner)
        new_capacity = max(needed, min(capacity + max(CHUNK, capacity // 2), self.max_tokens))
        grown = stored.new_zeros(rows, heads, new_capacity, dim)
        grown[:, :, :capacity] = stored[:rows]
        return grown

    def _laid_out(self, key: Tensor) -> _Layout:
        members: list[list[int]] = [[] for _ in range(self._prompts_decoded)]
        for row, prompt in enumerate(self.owner[: self.decoded - len(self.joining)]):
            members[prompt].append(row)
        width = max(map(len, members))
        places = {row: p * width + slot for p, rows in enumerate(members) for slot, row in enumerate(rows)}
        # a prompt all of whose rows join in this step has row 0 in their place
        padded = [rows + (rows or [0])[:1] * (width - len(rows)) for rows in members]
        slots = torch.tensor(padded, dtype=torch.int64, device=key.device)
        heads = torch.arange(key.shape[1], device=key.device)
        lengths = torch.tensor(self.prompt_lengths[: len(members)], device=key.device)
        longest = self._prefix[0][0].shape[2]
        return _Layout(
            (slots[:, None] * len(heads) + heads[:, None]).flatten(),
            torch.tensor([places[row] for row in sorted(places)], dtype=torch.int64, device=key.device),
            _bias(lengths, longest, key.dtype) if min(self.prompt_lengths) < longest else None,
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Stores the new tokens of the decoded rows, N together, and attends with them.

        Queries are `[1, Hq, N, D]`; returns `[1, N, Hq, D]`.
        """
        single, outs = self.decoded - len(self.joining), list[Tensor]()
        if single:
            q, k, v = (x[0, :, :single].transpose(0, 1) for x in (query, key, value))
            outs.append(self._attend_token(layer, q, k, v, scale)[None])
        parts = (torch.split(x[:, :, single:], self.joining, 2) for x in (query, key, value))
        for row, (q, k, v) in enumerate(zip(*parts, strict=True), single):
            outs.append(self._attend_joining(layer, row, q, k, v, scale))
        return torch.cat(outs, 1)

    def _attend_token(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Of the rows that get one token: `[S, Hq, D]` to `[S, Hq, D]`."""
        assert self._layout is not None and self._step is not None
        layout, step = self._layout, self._step
        rows, query_heads, dim = query.shape
        heads, repeats = key.shape[1], query_heads // key.shape[1]
        suffix_key, suffix_value = self._suffix[layer]
        suffix_key[step.rows, :, step.lengths] = key
        suffix_value[step.rows, :, step.lengths] = value
        # query heads that share keys, and rows that share a prompt, become more queries of one attention
        flat = query.reshape(rows * heads, repeats * dim)
        by_prompt = flat.index_select(0, layout.slots).view(self._prompts_decoded, heads, -1, dim)
        prefix_key, prefix_value = (x[: self._prompts_decoded] for x in self._prefix[layer])
        out1, lse1 = attend(by_prompt, prefix_key, prefix_value, scale=scale, bias=layout.bias)
        by_row = query.reshape(rows, heads, repeats, dim)
        own = (x[:rows, :, : step.end] for x in (suffix_key, suffix_value))
        out2, lse2 = attend(by_row, *own, scale=scale, bias=step.bias)
        # the kernel's memory layout is [.., query, Hk, D]: merging in it makes the next four lines views
        out1, lse1 = out1.transpose(1, 2).reshape(-1, query_heads * dim), lse1.mT.reshape(-1, query_heads)
        out2, lse2 = out2.transpose(1, 2), lse2.mT
        out1 = out1.index_select(0, layout.places).view(out2.shape)
        lse1 = lse1.index_select(0, layout.places).view(lse2.shape)
        return merge(out1, lse1, out2, lse2).transpose(1, 2).reshape(rows, query_heads, dim)

    def _attend_joining(
        self, layer: int, row: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Of a row that brings T tokens: `[1, Hq, T, D]` to `[1, T, Hq, D]`."""
        prompt, start, count = self.owner[row], self.lengths[row], query.shape[2]
        known: list[Tensor] = []
        pairs = zip(self._prefix[layer], self._suffix[layer], (key, value), strict=True)
        for prefix, suffix, new in pairs:
            suffix[row, :, start : start + count] = new[0]
            before = prefix[prompt, :, : self.prompt_lengths[prompt]]
            known.append(torch.cat([before, suffix[row, :, : start + count]], 1)[None])
        size = known[0].shape[2]
        mask = torch.ones(count, size, dtype=torch.bool, device=key.device).tril(size - count)
        out = F.scaled_dot_product_attention(query, *known, attn_mask=mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)

    def end_step(self) -> None:
        """Counts the tokens that all layers have stored; call after each `Decode`."""
        for row, count in enumerate(self.new_tokens):
            self.lengths[row] += count
        if self.joining:
            self.joining, self._layout = [], None

    def arrange(self, decoded: Sequence[int], waiting: Sequence[int]) -> list[int]:
        """Says which rows are decoded from now on and which wait; all others are dropped.

        Prompts without rows are dropped too. Returns the old indices of the remaining rows in order.
        """
        order = arranged(decoded, waiting)
        self._suffix = [(_moved(k, order), _moved(v, order)) for k, v in self._suffix]
        self.lengths = [self.lengths[row] for row in order]
        self.decoded, self._layout = len(decoded), None
        owner = [self.owner[row] for row in order]
        first = set(owner[: self.decoded])
        prompts = arranged(sorted(first), sorted(set(owner) - first))
        self._prompts_decoded = len(first)
        if prompts != list(range(len(self.prompt_lengths))):
            self._prefix = [(_moved(k, prompts), _moved(v, prompts)) for k, v in self._prefix]
        place = {prompt: i for i, prompt in enumerate(prompts)}
        self.owner = [place[prompt] for prompt in owner]
        self.prompt_lengths = [self.prompt_lengths[prompt] for prompt in prompts]
        return order


def _bias(lengths: Int64[Tensor, " B"], size: int, dtype: torch.dtype) -> Tensor:
    """`[B, 1, 1, size]`: 0 for the first `lengths[b]` keys, minus infinity for the others."""
    hidden = torch.arange(size, device=lengths.device) >= lengths[:, None]
    bias = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device)
    return bias.masked_fill(hidden, float("-inf"))[:, None, None]


def _moved(stored: Tensor, order: Sequence[int]) -> Tensor:
    """The entries in the order of `arranged`: in place, or in new storage if half of it is unused."""
    if 2 * len(order) <= len(stored):
        return stored[torch.tensor(order, dtype=torch.int64, device=stored.device)]
    moved = [i for i, entry in enumerate(order) if entry != i]
    if moved:
        stored[moved] = stored[[order[i] for i in moved]]
    return stored


class Prefill:
    """Attention of prompts that lie end to end in one row `[1, N]`, without padding; stores each prompt."""

    def __init__(self, cache: SharedPrefixCache, prompts: Sequence[int]) -> None:
        self._cache = cache
        self._prompts = prompts

    @property
    def longest(self) -> int:
        """The most tokens of a sequence."""
        return self._cache.longest

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        outs: list[Tensor] = []
        lengths = [self._cache.prompt_lengths[prompt] for prompt in self._prompts]
        parts = zip(*(torch.split(x, lengths, 2) for x in (query, key, value)), strict=True)
        for prompt, (q, k, v) in zip(self._prompts, parts, strict=True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            outs.append(out.transpose(1, 2))
            self._cache.store_prompt(layer, prompt, k[0], v[0])
        return torch.cat(outs, 1)


class Decode:
    """Attention of the new tokens of the decoded rows of several caches, which lie end to end in `[1, N]`."""

    def __init__(self, caches: Sequence[SharedPrefixCache]) -> None:
        self._caches = caches
        self._sizes = [sum(cache.new_tokens) for cache in caches]

    @property
    def longest(self) -> int:
        """The most tokens of a sequence."""
        return max(cache.longest for cache in self._caches)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        parts = zip(self._caches, *(torch.split(x, self._sizes, 2) for x in (query, key, value)), strict=True)
        return torch.cat([cache.attend(layer, q, k, v, scale) for cache, q, k, v in parts], 1)


AttentionPass = Prefill | Decode
"""The attention of one forward of the model; each layer calls `attend(layer, query, key, value, scale)`."""


def last_tokens(lengths: Sequence[int]) -> Int64[Tensor, " P"]:
    """The index of each sequence's last token when the sequences lie end to end."""
    return torch.tensor(lengths).cumsum(0) - 1
