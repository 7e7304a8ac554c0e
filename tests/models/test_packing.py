"""Ragged groups to packed tensors and back."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.learn.experience import pack_groups
from rlhf.models.packing import Unit, cut, fill, fill_rows, microbatches, pack, padded, separate
from tests.support import ALONE, random_groups


def test_a_group_is_packed_as_its_prompt_once_and_its_completions_behind_it():
    p, q, r, a, b, c = 10, 11, 12, 20, 21, 22
    packed = pack([torch.tensor([p, q, r])], [[torch.tensor([a, b]), torch.tensor([c])]])
    assert packed.token_ids.tolist() == [p, q, r, a, b, c]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert packed.rows.tolist() == [2, 3, 2]
    assert packed.targets.tolist() == [a, b, c]


def test_the_padded_form_has_a_row_a_sequence_and_the_same_targets():
    packed = pack([torch.tensor([1, 2])], [[torch.tensor([3, 4, 5]), torch.tensor([6])]])
    token_ids, mask, rows = padded(packed)
    assert token_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 6, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    # the token behind each row is the target
    assert token_ids.flatten()[rows + 1].tolist() == packed.targets.tolist()


def test_separate_sequences_have_a_prompt_each_and_the_same_targets():
    packed = pack([torch.tensor([1, 2])], [[torch.tensor([3, 4, 5]), torch.tensor([6])]])
    alone = separate(packed)
    assert alone.token_ids.tolist() == [1, 2, 3, 4, 5, 1, 2, 6]
    assert alone.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert alone.rows.tolist() == [1, 2, 3, 6] and alone.targets.tolist() == packed.targets.tolist()
    assert separate(alone) is alone


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 60))
def test_bins_hold_every_unit_once_and_overflow_only_when_a_unit_is_alone(costs: list[int], budget: int):
    units = [Unit(i, 0, 1, cost, cost) for i, cost in enumerate(costs)]
    bins = fill(units, budget)
    assert sorted(u.group for b in bins for u in b) == list(range(len(costs)))
    assert all(sum(u.cost for u in b) <= budget or len(b) == 1 for b in bins)


@given(st.integers(0, 1000), st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 80))
def test_microbatches_hold_every_token_once_and_never_cut_a_sequence(
    seed: int, sizes: list[int], budget: int
):
    packed = pack_groups(random_groups(seed, sizes=sizes), device=ALONE.device)
    micros = list(microbatches(packed, range(len(sizes)), budget))
    index = torch.cat([m.index for m in micros])
    assert index.sort().values.tolist() == list(range(len(packed.token_ids)))
    for micro in micros:
        assert micro.packed.targets.tolist() == packed.token_ids[micro.index].tolist()
        assert (
            micro.packed.positions[micro.packed.rows].tolist() == (packed.positions[micro.index] - 1).tolist()
        )
    owners = [set(packed.sequence[m.index].tolist()) for m in micros]
    assert sum(map(len, owners)) == len(packed.group)


def test_a_group_larger_than_the_budget_is_cut_between_sequences():
    packed = pack_groups(random_groups(3, sizes=[6]), device=ALONE.device)
    units = cut(packed, [0], budget=20, share=True)
    assert len(units) > 1
    assert [u.first for u in units[1:]] == [u.last for u in units[:-1]]


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 200))
def test_padded_bins_hold_the_budget_with_their_padding(costs: list[int], budget: int):
    units = [Unit(i, 0, 1, cost, cost) for i, cost in enumerate(costs)]
    bins = fill_rows(units, budget)
    assert sorted(u.group for b in bins for u in b) == list(range(len(costs)))
    assert all(len(b) * max(u.cost for u in b) <= budget or len(b) == 1 for b in bins)


def test_where_prompts_are_not_shared_every_sequence_pays_for_its_own():
    packed = pack_groups(random_groups(3, sizes=[4, 2]), device=ALONE.device)
    units = cut(packed, [0, 1], budget=1000, share=False)
    assert [u.last - u.first for u in units] == [1] * 6
    lengths = torch.bincount(packed.sequence).tolist()
    prompts = [len(packed.prompts[g]) for g in packed.group.tolist()]
    assert [u.cost for u in units] == [p + n for p, n in zip(prompts, lengths, strict=True)]
