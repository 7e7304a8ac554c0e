"""Attention over a part of the keys with its log-sum-exp, the merge of parts, and the shared-prefix cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.kernels.attention_parts import attend, attend_reference, merge
from rlhf.rollout.native.cache import Decode, Prefill, SharedPrefixCache, compacted_order


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
@given(
    st.integers(0, 30).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.integers(0, max(0, n - 1)), max_size=n))
    )
)
def test_compacting_keeps_every_entry_that_is_not_dropped_and_moves_few(case: tuple[int, set[int]]) -> None:
    size, dropped = case
    dropped &= set(range(size))
    order = compacted_order(size, sorted(dropped))
    assert sorted(order) == sorted(set(range(size)) - dropped)
    assert sum(i != entry for i, entry in enumerate(order)) <= len(dropped)


class Naive:
    """Attention with separate keys and values for every row, one row at a time."""

    def __init__(self) -> None:
        self.context: dict[str, tuple[Tensor, Tensor]] = {}

    def attend(self, name: str, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if name in self.context:
            key, value = (torch.cat(pair, 1) for pair in zip(self.context[name], (key, value), strict=True))
        self.context[name] = (key, value)
        return attend_reference(query[None], key[None], value[None], scale=scale)[0][0]


def test_rows_that_share_prompts_and_leave_attend_as_if_each_had_its_own_cache() -> None:
    """Two caches in one batch, ragged prompts, ragged groups, more tokens than a chunk, rows that leave."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> list[Tensor]:
        return [
            torch.randn(*s, 8, generator=generator)
            for s in ((shape[0], 4, shape[1]), (shape[0], 2, shape[1]))
        ]

    naive = Naive()
    caches = [SharedPrefixCache([3, 7, 2], [3, 1, 4], 150), SharedPrefixCache([5], [2], 150)]
    names: list[list[str]] = []
    for c, cache in enumerate(caches):
        (query, key), (_, value) = new(1, sum(cache.prompt_lengths)), new(1, sum(cache.prompt_lengths))
        Prefill(cache, range(len(cache.prompt_lengths))).attend(0, query, key, value, 0.4)
        starts = [sum(cache.prompt_lengths[:p]) for p in range(len(cache.prompt_lengths))]
        names.append([f"{c}.{row}" for row in range(len(cache.owner))])
        for name, p in zip(names[c], cache.owner, strict=True):
            part = slice(starts[p], starts[p] + cache.prompt_lengths[p])
            naive.context[name] = (key[0, :, part], value[0, :, part])
    leaving = {2: [[1], []], 5: [[3], [0]], 70: [[0, 1], []], 90: [[0, 1, 2, 3], []]}
    for token in range(100):
        rows = [name for group in names for name in group]
        (query, key), (_, value) = new(len(rows), 1), new(len(rows), 1)
        live = [cache for cache, group in zip(caches, names, strict=True) if group]
        for cache in live:
            cache.begin_token()
        out = Decode(live).attend(0, query, key, value, 0.4)
        for cache in live:
            cache.end_token()
        expected = [naive.attend(n, query[i], key[i], value[i], 0.4)[:, 0] for i, n in enumerate(rows)]
        torch.testing.assert_close(out[:, 0], torch.stack(expected), atol=1e-5, rtol=1e-5)
        for c, dropped in enumerate(leaving.get(token, [[], []])):
            if dropped:
                names[c] = [names[c][i] for i in caches[c].drop(dropped)]
    assert names == [[], ["1.1"]]


def test_a_cache_says_what_it_may_grow_to_and_gives_half_back() -> None:
    cache = SharedPrefixCache([3, 5], [4, 4], 100)
    key = torch.zeros(1, 2, 8, 8)
    Prefill(cache, [0, 1]).attend(0, torch.zeros(1, 4, 8, 8), key, key, 1.0)
    assert cache.bytes_per_token == 2 * 2 * 8 * 4
    assert cache.reserved_tokens == 2 * 5 + 8 * 100
    cache.drop([0, 1, 2])
    assert cache.reserved_tokens == 2 * 5 + 8 * 100
    cache.drop([4])
    assert cache.reserved_tokens == 2 * 5 + 4 * 100
