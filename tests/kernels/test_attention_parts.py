"""Attention over a part of the keys with its log-sum-exp, the merge of parts, and the shared-prefix cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.kernels.attention_parts import attend, attend_reference, merge
from rlhf.rollout.native.cache import Decode, Prefill, SharedPrefixCache, arranged


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("kind", ["plain", "bias"])
def test_attention_and_its_log_sum_exp_are_those_of_the_reference(
    dtype: torch.dtype, heads: tuple[int, int], kind: str
) -> None:
    query_heads, key_heads = heads
    length = 70
    query = normal(3, query_heads, 5, 16, dtype=dtype)
    key, value = (normal(3, key_heads, length, 16, seed=s, dtype=dtype) for s in (1, 2))
    bias = None
    if kind == "bias":
        hidden = torch.arange(length) >= torch.tensor([[1], [69], [70]])
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, float("-inf"))[:, None, None]
    out, lse = attend(query, key, value, scale=0.3, bias=bias)
    expected, expected_lse = attend_reference(query, key, value, scale=0.3, bias=bias)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=tolerance, rtol=tolerance)


def test_the_reference_is_a_softmax() -> None:
    query, key, value = normal(1, 2, 3, 4), normal(1, 1, 5, 4, seed=1), normal(1, 1, 5, 4, seed=2)
    out, _ = attend_reference(query, key, value, scale=0.5)
    torch.testing.assert_close(out, (query @ key.mT * 0.5).softmax(-1) @ value)


@settings(deadline=None)
@given(split=st.integers(1, 19), seed=st.integers(0, 10**6))
def test_two_parts_merged_are_the_whole(split: int, seed: int) -> None:
    query, key, value = (normal(2, 3, size, 8, seed=seed + size) for size in (4, 20, 20))
    first = attend_reference(query, key[:, :, :split], value[:, :, :split], scale=1.0)
    second = attend_reference(query, key[:, :, split:], value[:, :, split:], scale=1.0)
    whole, _ = attend_reference(query, key, value, scale=1.0)
    torch.testing.assert_close(merge(*first, *second), whole, atol=1e-5, rtol=1e-5)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=30))
def test_arranging_keeps_every_entry_of_each_part_and_moves_few(part_of: list[int]) -> None:
    """Two parts, and entries that are dropped."""
    parts = [[i for i, part in enumerate(part_of) if part == wanted] for wanted in (0, 1)]
    order = arranged(*parts)
    size = len(parts[0])
    assert [sorted(order[:size]), sorted(order[size:])] == parts
    # only what is outside of its part's places is moved
    moved = [entry for i, entry in enumerate(order) if i != entry]
    assert all((entry < size) != (entry in parts[0]) or entry >= len(order) for entry in moved)


class Naive:
    """Attention with separate keys and values for every row, one row at a time."""

    def __init__(self) -> None:
        self.context: dict[str, tuple[Tensor, Tensor]] = {}

    def attend(self, name: str, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Of the new tokens of a row: `[Hq, T, D]`."""
        outs: list[Tensor] = []
        for token in range(query.shape[1]):
            one = slice(token, token + 1)
            before_key, before_value = self.context[name]
            keys = torch.cat([before_key, key[:, one]], 1)
            values = torch.cat([before_value, value[:, one]], 1)
            self.context[name] = keys, values
            outs.append(attend_reference(query[None, :, one], keys[None], values[None], scale=scale)[0][0])
        return torch.cat(outs, 1)


def test_rows_that_share_prompts_leave_wait_and_join_attend_as_if_each_had_its_own_cache() -> None:
    """Two caches in one batch, ragged prompts, ragged groups, more tokens than a chunk."""
    generator = torch.Generator().manual_seed(0)

    def new(tokens: int) -> list[Tensor]:
        """Query, key and value."""
        return [torch.randn(1, heads, tokens, 8, generator=generator) for heads in (4, 2, 2)]

    naive = Naive()
    caches = [SharedPrefixCache([3, 7, 2], [3, 1, 4], 150), SharedPrefixCache([5], [2], 150)]
    names: list[list[str]] = []
    for c, cache in enumerate(caches):
        query, key, value = new(sum(cache.prompt_lengths))
        Prefill(cache, range(len(cache.prompt_lengths))).attend(0, query, key, value, 0.4)
        starts = [sum(cache.prompt_lengths[:p]) for p in range(len(cache.prompt_lengths))]
        names.append([f"{c}.{row}" for row in range(len(cache.owner))])
        for name, p in zip(names[c], cache.owner, strict=True):
            part = slice(starts[p], starts[p] + cache.prompt_lengths[p])
            naive.context[name] = (key[0, :, part], value[0, :, part])
    # after a step: the rows of each cache that are decoded, those that wait, and the tokens that the last
    # of the decoded ones bring to the next step
    events: dict[int, list[tuple[list[str], list[str], list[int]]]] = {
        2: [(["0.0", "0.2", "0.4", "0.5", "0.6", "0.7"], ["0.3"], []), (["1.0", "1.1"], [], [])],
        5: [(["0.0", "0.4", "0.6"], ["0.2", "0.3", "0.5", "0.7"], []), (["1.1"], ["1.0"], [])],
        # row 3 is the only one of its prompt, and longer than a chunk when it has joined
        9: [(["0.0", "0.4", "0.6", "0.3", "0.7"], ["0.2", "0.5"], [70, 2]), (["1.1"], ["1.0"], [])],
        12: [(["0.3", "0.7"], ["0.5", "0.6"], []), (["1.1", "1.0"], [], [9])],
        30: [(["0.3", "0.6", "0.5"], [], [1, 4]), (["1.0", "1.1"], [], [])],
        40: [(["0.5"], [], []), (["1.0"], [], [])],
    }
    for step in range(50):
        rows = [name for c, cache in enumerate(caches) for name in names[c][: cache.decoded]]
        counts = [count for cache in caches for count in cache.new_tokens]
        query, key, value = new(sum(counts))
        for cache in caches:
            cache.begin_step()
        out = Decode(caches).attend(0, query, key, value, 0.4)
        for cache in caches:
            cache.end_step()
        parts = zip(rows, *(torch.split(x[0], counts, 1) for x in (query, key, value)), strict=True)
        expected = torch.cat([naive.attend(name, q, k, v, 0.4) for name, q, k, v in parts], 1)
        torch.testing.assert_close(out[0].transpose(0, 1), expected, atol=1e-5, rtol=1e-5)
        for c, (decoded, waiting, joining) in enumerate(events.get(step, [])):
            parts = ([names[c].index(name) for name in part] for part in (decoded, waiting))
            order = caches[c].arrange(*parts)
            names[c] = [names[c][i] for i in order]
            caches[c].joining = joining
            assert sorted(names[c][: len(decoded)]) == sorted(decoded)
            for place, name in enumerate(names[c]):
                assert caches[c].known(place) == naive.context[name][0].shape[1]
    assert names == [["0.5"], ["1.0"]]


def test_a_cache_says_what_it_may_grow_to_and_gives_half_back() -> None:
    cache = SharedPrefixCache([3, 5], [4, 4], 100)
    key = torch.zeros(1, 2, 8, 8)
    Prefill(cache, [0, 1]).attend(0, torch.zeros(1, 4, 8, 8), key, key, 1.0)
    assert cache.bytes_per_token == 2 * 2 * 8 * 4
    assert cache.reserved_tokens == 2 * 5 + 8 * 100
    cache.arrange([3, 4, 5], [6, 7])
    assert cache.reserved_tokens == 2 * 5 + 8 * 100
    cache.arrange([0, 1, 2], [4])
    assert cache.reserved_tokens == 2 * 5 + 4 * 100
