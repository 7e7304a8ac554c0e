"""A deterministic reward function is not called twice for the same sample."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.metrics import Mean
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.scoring import Rewards
from rlhf.rewards.workers.cache import ScoreCache
from rlhf.rewards.workers.pool import RewardError
from tests.rewards.test_scoring import completions_of, prompt, rewards_of

MINE = str(Path(__file__).with_name("my_rewards.py"))

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


@given(a=plain, b=plain)
def test_keys_are_equal_where_arguments_are_and_differ_where_they_do(a: Any, b: Any) -> None:
    def key(value: Any, state: int = 0) -> bytes:
        return ScoreCache.key({"completions": ["x"], "answer": [value, value], "trainer_state": state})

    import copy

    assert key(a) == key(copy.deepcopy(a), state=1)
    # 1 == True in Python, but a function may distinguish them
    assert (key(a) == key(b)) == (repr(a) == repr(b))


def test_the_samples_used_last_are_kept() -> None:
    memory = ScoreCache(2)
    memory.put(b"a", {"r": 1.0})
    memory.put(b"b", {"r": 2.0})
    assert memory.get(b"a") == {"r": 1.0}
    memory.put(b"c", {"r": 3.0})
    assert [memory.get(key) for key in (b"a", b"b", b"c")] == [{"r": 1.0}, None, {"r": 3.0}]


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[tuple[Rewards, Path]]:
    """A function that writes each completion it is called with to a file."""
    calls = tmp_path / "calls"
    spec = RewardSpec(f"{MINE}:noted", params={"file": str(calls)}, batch=2, workers=1, cache=100)
    rewards = Rewards([spec], ("answer",), max_failed_share=0.5)
    yield rewards, calls
    rewards.close()


def test_what_repeats_is_scored_once(counted: tuple[Rewards, Path]) -> None:
    rewards, calls = counted
    prompts = [prompt(1, answer=1), prompt(2, answer=1), prompt(3, answer=2)]

    def score(texts: list[list[str]]) -> tuple[list[Any], Mean]:
        groups, metrics = rewards.score(prompts, completions_of(prompts, texts), texts, trainer_state={})
        recalled = metrics["reward/recalled/noted"]
        assert isinstance(recalled, Mean)
        return rewards_of(groups), recalled

    texts = [["a", "bb", "a"], ["a"], ["a", ""]]
    first, recalled = score(texts)
    assert first == [[1.0, 2.0, 1.0], [1.0], [1.0, None]]
    # equal text and columns make equal samples; a different column makes a different sample
    assert sorted(calls.read_text().split("\n")[:-1]) == ["", "a/1", "a/2", "bb/1"]
    assert recalled == Mean(2, 6)
    again, recalled = score(texts)
    assert again == first
    # failures are not cached: the sample is scored again
    assert calls.read_text().count("\n") == 5
    assert recalled == Mean(5, 6)


def test_samples_alike_fail_together(tmp_path: Path) -> None:
    spec = RewardSpec(f"{MINE}:noted", params={"file": str(tmp_path / "calls")}, workers=1, cache=9)
    rewards = Rewards([spec], ("answer",), max_failed_share=0.5)
    texts = [["", "a", ""]]
    with pytest.raises(RewardError, match=r"2 of 3 samples have no reward.*noted failed on 2"):
        rewards.score([prompt(1, answer=1)], completions_of([prompt(1)], texts), texts, trainer_state={})
    rewards.close()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (RewardSpec(f"{MINE}:brevity", cache=9, batch="group"), "brevity sees whole groups or steps"),
        (RewardSpec(f"{MINE}:step", cache=9), "step asks for trainer_state"),
    ],
)
def test_a_function_that_may_say_something_else_has_no_cache(spec: RewardSpec, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*set its cache to 0"):
        Rewards([spec], ())
