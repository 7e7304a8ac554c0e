"""Key-value cache of the native engine: each prompt stored once, shared by the rows that continue it.

    prefix   per layer  [P, Hk, L, D]   an entry per prompt, right-padded to the longest; a bias masks padding
    suffix   per layer  [S, Hk, T, D]   an entry per row; all rows have the same number of tokens, so no bias

P prompts, S rows, Hk heads of keys, L tokens of the longest prompt, T tokens sampled so far, D head size. The
suffix grows with the tokens. When a row finishes, or a prompt loses its last row, the last entry is moved
into its place; the storage is halved when half of it is unused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from rlhf.kernels.attention_parts import attend, merge

CHUNK = 64


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Keys and values `[Hk, L, D]` of one sequence, by layer."""

    layers: list[tuple[Tensor, ...]]

    @property
    def length(self) -> int:
        """The number of tokens, L."""
        return self.layers[0][0].shape[1]


def compacted_order(size: int, dropped: Sequence[int]) -> list[int]:
    """The old indices of `size` entries after dropping some: the last entries fill the gaps.

    `compacted_order(5, [1, 3]) == [0, 4, 2]`
    """
    gone = set(dropped)
    kept = size - len(gone)
    movers = (i for i in range(kept, size) if i not in gone)
    return [next(movers) if i in gone else i for i in range(kept)]


class SharedPrefixCache:
    """Cache of several prompts and their rows, filled by one or more `Prefill`, then a `Decode` per token.

    It may grow to `reserved_tokens` times `bytes_per_token` bytes. `begun` has the beginning of some prompts,
    whose keys and values are known.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        group_sizes: Sequence[int],
        max_tokens: int,
        begun: Mapping[int, Kept] | None = None,
    ) -> None:
        self.prompt_lengths = list(prompt_lengths)
        self.begun = {} if begun is None else dict(begun)
        """By prompt; empty once all prompts are stored."""
        self.owner = [p for p, size in enumerate(group_sizes) for _ in range(size)]
        """Index of the prompt of each row, `[S]`."""
        self.length = 0
        """Number of tokens that each row has after its prompt."""
        self._max_tokens = max_tokens
        self._prefix: list[tuple[Tensor, Tensor]] = []
        self._suffix: list[tuple[Tensor, Tensor]] = []
        self._bias: Tensor | None = None
        self._slots: Tensor | None = None
        self._place: Tensor | None = None

    @property
    def longest(self) -> int:
        """The most tokens that a prompt and its continuation may have together."""
        return max(self.prompt_lengths) + self._max_tokens

    @property
    def reserved_tokens(self) -> int:
        prefix, suffix = self._prefix[0][0], self._suffix[0][0]
        return prefix.shape[0] * prefix.shape[2] + suffix.shape[0] * self._max_tokens

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(x.shape[1] * x.shape[3] * x.itemsize for pair in self._prefix for x in pair)

    def store_prompt(self, layer: int, prompt: int, key: Tensor, value: Tensor) -> None:
        """Stores all keys and values `[Hk, L, D]` of one prompt at one layer; layers must come in order."""
        if layer == len(self._prefix):
            self._prefix.append((self._new_prefix(key), self._new_prefix(value)))
            self._suffix.append((self._new_suffix(key), self._new_suffix(value)))
        for stored, new in zip(self._prefix[layer], (key, value), strict=True):
            stored[prompt, :, : new.shape[1]] = new

    def kept(self, row: int) -> Kept:
        """A copy of the keys and values of a row: of its prompt, and of all its tokens but the last."""
        prompt = self.owner[row]
        end = self.prompt_lengths[prompt]
        return Kept(
            [
                tuple(
                    torch.cat([before[prompt, :, :end], own[row, :, : self.length]], 1)
                    for before, own in zip(prefix, suffix, strict=True)
                )
                for prefix, suffix in zip(self._prefix, self._suffix, strict=True)
            ]
        )

    def _new_prefix(self, like: Tensor) -> Tensor:
        # zeros, since the weight 0 of a masked key times uninitialised NaN would be NaN
        return like.new_zeros(
            len(self.prompt_lengths), like.shape[0], max(self.prompt_lengths), like.shape[2]
        )

    def _new_suffix(self, like: Tensor) -> Tensor:
        return like.new_empty(len(self.owner), like.shape[0], min(CHUNK, self._max_tokens), like.shape[2])

    def begin_token(self) -> None:
        """Makes room for one more token in every row; call before each `Decode`."""
        capacity = self._suffix[0][0].shape[2]
        if self.length == capacity:
            self._suffix = [(self._grown(k), self._grown(v)) for k, v in self._suffix]
        if self._slots is None:
            self._lay_out()

    def _grown(self, stored: Tensor) -> Tensor:
        _, heads, capacity, dim = stored.shape
        rows = len(self.owner)
        new_capacity = min(capacity + max(CHUNK, capacity // 2), self._max_tokens)
        grown = stored.new_empty(rows, heads, new_capacity, dim)
        grown[:, :, :capacity] = stored[:rows]
        return grown

    def _lay_out(self) -> None:
        """Computes indices between rows and `[P, G]` (prompt, row of its group), smaller groups padded."""
        members: list[list[int]] = [[] for _ in self.prompt_lengths]
        for row, prompt in enumerate(self.owner):
            members[prompt].append(row)
        width = max(map(len, members))
        place = [0] * len(self.owner)
        for prompt, rows in enumerate(members):
            for slot, row in enumerate(rows):
                place[row] = prompt * width + slot
        key = self._prefix[0][0]
        slots = torch.tensor([rows + rows[:1] * (width - len(rows)) for rows in members], device=key.device)
        self._place = torch.tensor(place, device=key.device)
        # [P * Hk * G] indices into queries viewed as [S * Hk, repeats * D]
        heads = torch.arange(key.shape[1], device=key.device)
        self._slots = (slots[:, None] * len(heads) + heads[:, None]).flatten()
        self._bias = None
        if min(self.prompt_lengths) < key.shape[2]:
            lengths = torch.tensor(self.prompt_lengths, device=key.device)
            hidden = torch.arange(key.shape[2], device=key.device) >= lengths[:, None]
            bias = torch.zeros(hidden.shape, dtype=key.dtype, device=key.device)
            self._bias = bias.masked_fill(hidden, float("-inf"))[:, None, None]

    def attend_token(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Stores one new token per row and attends with it: `[S, Hq, 1, D]` to `[S, 1, Hq, D]`."""
        assert self._slots is not None and self._place is not None
        rows, query_heads, _, dim = query.shape
        heads, repeats = key.shape[1], query_heads // key.shape[1]
        prompts, end = len(self.prompt_lengths), self.length + 1
        suffix_key, suffix_value = self._suffix[layer]
        suffix_key[:rows, :, self.length] = key[:, :, 0]
        suffix_value[:rows, :, self.length] = value[:, :, 0]
        # query heads that share keys, and rows that share a prompt, become more queries of one attention
        flat = query.reshape(rows * heads, repeats * dim)
        by_prompt = flat.index_select(0, self._slots).view(prompts, heads, -1, dim)
        prefix_key, prefix_value = (x[:prompts] for x in self._prefix[layer])
        out1, lse1 = attend(by_prompt, prefix_key, prefix_value, scale=scale, bias=self._bias)
        by_row = query.reshape(rows, heads, repeats, dim)
        out2, lse2 = attend(by_row, suffix_key[:rows, :, :end], suffix_value[:rows, :, :end], scale=scale)
        # the kernel's memory layout is [.., query, Hk, D]: merging in it makes the next four lines views
        out1, lse1 = out1.transpose(1, 2).reshape(-1, query_heads * dim), lse1.mT.reshape(-1, query_heads)
        out2, lse2 = out2.transpose(1, 2), lse2.mT
        out1 = out1.index_select(0, self._place).view(out2.shape)
        lse1 = lse1.index_select(0, self._place).view(lse2.shape)
        return merge(out1, lse1, out2, lse2).transpose(1, 2).reshape(rows, 1, query_heads, dim)

    def end_token(self) -> None:
        """Counts the token that all layers have stored; call after each `Decode`."""
        self.length += 1

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Drops rows, and prompts without rows; returns the old indices of the remaining rows in order."""
        order = compacted_order(len(self.owner), rows)
        self._suffix = [(_keep(k, order), _keep(v, order)) for k, v in self._suffix]
        owner = [self.owner[row] for row in order]
        left = set(owner)
        prompts = compacted_order(
            len(self.prompt_lengths), [p for p in range(len(self.prompt_lengths)) if p not in left]
        )
        if len(prompts) < len(self.prompt_lengths):
            self._prefix = [(_keep(k, prompts), _keep(v, prompts)) for k, v in self._prefix]
        place = {prompt: i for i, prompt in enumerate(prompts)}
        self.owner = [place[prompt] for prompt in owner]
        self.prompt_lengths = [self.prompt_lengths[prompt] for prompt in prompts]
        self._slots = None
        return order


def _keep(stored: Tensor, order: Sequence[int]) -> Tensor:
    """The entries in the order of `compacted_order`: in place, or in new storage if half of it is unused."""
    if 2 * len(order) <= len(stored):
        return stored[torch.tensor(order, dtype=torch.int64, device=stored.device)]
    holes = [i for i, entry in enumerate(order) if entry != i]
    if holes:
        stored[holes] = stored[[order[i] for i in holes]]
    return stored


class Prefill:
    """Attention of prompts that lie end to end in one row `[1, N]`, without padding; stores each prompt.

    Of a prompt that is begun only the rest is in the row.
    """

    def __init__(self, cache: SharedPrefixCache, prompts: Sequence[int]) -> None:
        self._cache = cache
        self._prompts = prompts

    @property
    def longest(self) -> int:
        """The most tokens of a sequence."""
        return self._cache.longest

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        outs: list[Tensor] = []
        begun = [self._cache.begun.get(prompt) for prompt in self._prompts]
        lengths = [self._cache.prompt_lengths[prompt] for prompt in self._prompts]
        rest = [length - (b.length if b else 0) for length, b in zip(lengths, begun, strict=True)]
        parts = zip(*(torch.split(x, rest, 2) for x in (query, key, value)), strict=True)
        for prompt, before, (q, k, v) in zip(self._prompts, begun, parts, strict=True):
            mask = None
            if before is not None:
                known = before.layers[layer]
                k, v = (torch.cat([old[None], new], 2) for old, new in zip(known, (k, v), strict=True))
                mask = _lower_right(q.shape[2], k.shape[2], q.device)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
            outs.append(out.transpose(1, 2))
            self._cache.store_prompt(layer, prompt, k[0], v[0])
        return torch.cat(outs, 1)


def _lower_right(queries: int, keys: int, device: torch.device) -> Tensor:
    """The causal mask of the last `queries` of `keys` tokens."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class Decode:
    """Attention of one token per row, `[S, 1]`, for the rows of several caches one after the other."""

    def __init__(self, caches: Sequence[SharedPrefixCache]) -> None:
        self._caches = caches
        self._sizes = [len(cache.owner) for cache in caches]

    @property
    def longest(self) -> int:
        """The most tokens of a sequence."""
        return max(cache.longest for cache in self._caches)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if len(self._caches) == 1:
            return self._caches[0].attend_token(layer, query, key, value, scale)
        parts = zip(self._caches, *(torch.split(x, self._sizes) for x in (query, key, value)), strict=True)
        return torch.cat([cache.attend_token(layer, q, k, v, scale) for cache, q, k, v in parts])


AttentionPass = Prefill | Decode
"""The attention of one forward of the model; each layer calls `attend(layer, query, key, value, scale)`."""


def last_tokens(lengths: Sequence[int]) -> Int64[Tensor, " P"]:
    """The index of each prompt's last token when the prompts lie end to end."""
    return torch.tensor(lengths).cumsum(0) - 1
