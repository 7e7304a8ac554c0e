"""Reward functions are found, checked and called as TRL calls them; failures are masked, counted, named."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.metrics import Mean, Metrics, merge
from rlhf.rewards.plugin import RewardSpec, load_reward
from rlhf.rewards.scoring import Rewards
from rlhf.rewards.workers.pool import RewardError
from rlhf.types import Completion, FinishReason, Group, Prompt, VersionSpan

MINE = str(Path(__file__).with_name("my_rewards.py"))


def mine(name: str, weight: float = 1.0, batch: Any = 1, **params: Any) -> RewardSpec:
    return RewardSpec(f"{MINE}:{name}", weight, params, batch=batch, workers=1)


def prompt(number: int, content: Any = "Why?", **columns: Any) -> Prompt:
    return Prompt(f"train.jsonl:{number}", (1,), content, columns)


def score(
    specs: Sequence[RewardSpec],
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    max_failed_share: float = 0.1,
) -> tuple[list[Group], Metrics]:
    rewards = Rewards(specs, prompts[0].columns, max_failed_share=max_failed_share)
    try:
        return rewards.score(prompts, completions_of(prompts, texts), texts, trainer_state={"global_step": 7})
    finally:
        rewards.close()


def completions_of(prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]) -> list[list[Completion]]:
    """Completions with one token id per character of the texts."""
    return [
        [
            Completion(
                p.id,
                i,
                tuple(map(ord, text)),
                (-0.5,) * len(text),
                FinishReason.STOP,
                (VersionSpan(0, 0, len(text)),),
            )
            for i, text in enumerate(group)
        ]
        for p, group in zip(prompts, texts, strict=True)
    ]


def rewards_of(groups: Sequence[Group]) -> list[list[float | None]]:
    return [[trajectory.reward for trajectory in group.trajectories] for group in groups]


def test_groups_of_any_size_come_back_as_they_went_in() -> None:
    groups, _ = score(
        [mine("brevity", limit=2)], [prompt(1), prompt(2), prompt(3)], [["a", "bcd"], [], ["ef"]]
    )
    assert rewards_of(groups) == [[1.0, 0.0], [], [1.0]]
    assert [group.prompt.id for group in groups] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    trajectory = groups[0].trajectories[1]
    assert (trajectory.text, trajectory.token_ids) == ("bcd", (98, 99, 100))
    assert (trajectory.objectives, trajectory.loss_mask) == ({"brevity": 0.0}, (True,) * 3)


def test_a_function_written_for_trl_gets_what_trl_gives_it() -> None:
    chat = [{"role": "user", "content": "3 + 5?"}]
    prompts = [prompt(1, chat, solution="8", level=1), prompt(2, chat, solution="", level=2)]
    groups, _ = score([mine("trl_accuracy"), mine("brevity")], prompts, [["8", "9"], ["8"]])
    assert [t.objectives for g in groups for t in g.trajectories] == [
        {"trl_accuracy": 1.0, "brevity": 1.0},
        {"trl_accuracy": 0.0, "brevity": 1.0},
        {"brevity": 1.0},
    ]


def test_every_argument_is_a_list_with_an_entry_a_completion(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Why?"}]
    seen = tmp_path / "seen.json"
    score(
        [mine("everything", batch="step", seen=str(seen), extra=1)],
        [prompt(1, chat, level=3), prompt(2, "How?", level=4)],
        [["a", "b"], ["c"]],
    )
    assert json.loads(seen.read_text()) == {
        "prompts": [chat, chat, "How?"],
        "completions": [
            [{"role": "assistant", "content": "a"}],
            [{"role": "assistant", "content": "b"}],
            "c",
        ],
        "completion_ids": [[97], [98], [99]],
        "level": [3, 3, 4],
        "extra": 1,
        "trainer_state": {"global_step": 7},
    }


def test_relative_paths_are_those_of_where_the_run_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(Path(MINE).read_text())
    (tmp_path / "words.txt").write_text("cat dog")
    groups, _ = score(
        [RewardSpec("mine.py:Dictionary", params={"words": "words.txt"})], [prompt(1)], [["cat", "cow"]]
    )
    assert rewards_of(groups) == [[1.0, 0.0]]


def test_trainer_state_and_coroutines_and_arrays_are_understood() -> None:
    groups, _ = score(
        [mine("step"), mine("slow", 10.0), mine("numpy_scores", 100.0, batch="step")],
        [prompt(1)],
        [["a", "b"]],
    )
    assert rewards_of(groups) == [[17.0, 117.0]]


def test_the_reward_is_the_weighted_sum_of_the_objectives_that_gave_a_number() -> None:
    groups, _ = score([mine("brevity", 0.5), mine("two_objectives", 2.0)], [prompt(1)], [["please", "ok"]])
    assert [t.objectives for t in groups[0].trajectories] == [
        {"brevity": 0.0, "length": 6.0, "polite": 1.0},
        {"brevity": 1.0, "length": 2.0},
    ]
    assert rewards_of(groups) == [[14.0, 4.5]]


def test_each_objective_has_the_weight_of_its_function() -> None:
    rewards = Rewards([mine("brevity", 0.5), mine("two_objectives", 2.0)], ())
    completion = Completion("train.jsonl:1", 0, (1,), (0.0,), FinishReason.STOP, (VersionSpan(0, 0, 1),))
    rewards.score([prompt(1)], [[completion]], [["please"]], trainer_state={})
    rewards.close()
    assert rewards.weights == {"brevity": 0.5, "length": 2.0, "polite": 2.0}


def test_the_same_function_twice_is_two_objectives() -> None:
    groups, _ = score([mine("brevity", limit=1), mine("brevity", limit=3)], [prompt(1)], [["abc"]])
    assert groups[0].trajectories[0].objectives == {"brevity": 0.0, "brevity_2": 1.0}


def test_none_of_one_function_means_it_does_not_apply() -> None:
    groups, metrics = score(
        [mine("only_questions"), mine("slow", 0.5)], [prompt(1, "Why?"), prompt(2, "So.")], [["a"], ["b"]]
    )
    assert rewards_of(groups) == [[2.5], [0.5]]
    assert metrics["reward/failed"] == Mean(0, 2)


def test_none_of_every_function_is_no_reward() -> None:
    groups, _ = score([mine("never_applies")], [prompt(1)], [["a"]], max_failed_share=1.0)
    assert rewards_of(groups) == [[None]]
    with pytest.raises(RewardError, match=r"1 of 1 samples have no reward.*no function applies"):
        score([mine("never_applies")], [prompt(1)], [["a"]])


def test_a_failed_sample_is_masked_and_counted_and_never_scored_by_the_others_alone() -> None:
    groups, metrics = score(
        [mine("nan_when_empty"), mine("slow")], [prompt(1)], [["", "a", "b"]], max_failed_share=0.5
    )
    assert rewards_of(groups) == [[None, 2.0, 2.0]]
    assert groups[0].rewards == [2.0, 2.0]
    assert groups[0].trajectories[0].objectives == {"slow": 1.0}
    assert metrics["reward/failed"] == Mean(1, 3)
    assert metrics["reward/mean"] == Mean(4.0, 2)


def test_too_many_failures_stop_the_run_and_name_function_and_cause() -> None:
    texts = [["", "a", "b", "c", "d", "e", "f", "g", "h", "i"]]
    score([mine("nan_when_empty")], [prompt(1)], texts)
    message = r"2 of 11 .* more than max_failed_share = 0.1: nan_when_empty failed on 2 \(nan for"
    with pytest.raises(RewardError, match=message):
        score([mine("nan_when_empty")], [prompt(1)], [[*texts[0], ""]])


def test_an_exception_is_logged_with_its_traceback_and_is_the_cause_of_the_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(RewardError, match=r"broken failed on 1 .ZeroDivisionError: .* for train.jsonl:1#0, "):
        score([mine("slow"), mine("broken")], [prompt(1)], [["a"]])
    assert "reward function broken failed on sample train.jsonl:1#0" in caplog.text
    assert "return [1.0 / 0 for _ in completions]" in caplog.text
    assert "rlhf/rewards/worker.py" not in caplog.text


def test_an_exception_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    rewards = Rewards([mine("broken")], (), max_failed_share=1.0)
    completion = Completion("train.jsonl:1", 0, (1,), (0.0,), FinishReason.STOP, (VersionSpan(0, 0, 1),))
    for _ in range(2):
        groups, _ = rewards.score([prompt(1)], [[completion]], [["a"]], trainer_state={})
        assert rewards_of(groups) == [[None]]
    rewards.close()
    assert caplog.text.count("reward function broken failed") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_short", "one_short must return 1 values, one a completion, got 0"),
        ("words", "words must return numbers, dicts of numbers or None, got str 'good'"),
        ("one_number", r"one_number must return a list of 1 values, one a completion, got float 1\.0"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused_with_the_functions_name(name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score([mine(name)], [prompt(1)], [["a", "b"]], max_failed_share=1.0)


def test_two_functions_may_not_name_one_objective() -> None:
    with pytest.raises(
        RewardError, match="two_objectives and two_objectives_2 both name an objective 'length'"
    ):
        score([mine("two_objectives"), mine("two_objectives")], [prompt(1)], [["a"]])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (mine("brevety"), r"has no 'brevety'; did you mean brevity\?"),
        (mine("not_a_function"), "must be a function or a class, got 3"),
        (mine("brevity", limits=3), r"does not take 'limits' \(did you mean 'limit'\?\)"),
        (mine("everything", prompts=[]), "'prompts' is given by the trainer"),
        (RewardSpec("no_such_file.py:reward"), "there is no file no_such_file.py"),
        (RewardSpec("no_such_package:reward"), "there is no module 'no_such_package'"),
        (RewardSpec("no_such_name"), "no installed package offers a reward function 'no_such_name'"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_reason(spec: RewardSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


def test_an_installed_package_offers_functions_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Puts a package as an installer would leave it on the path of the trainer and thereby of its workers."""
    (tmp_path / "their_rewards.py").write_text(
        "def polite(completions, **_): return [7.0] * len(completions)"
    )
    info = tmp_path / "their_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rlhf.rewards]\npolite = their_rewards:polite\n")
    monkeypatch.syspath_prepend(tmp_path)
    groups, _ = score([RewardSpec("polite")], [prompt(1)], [["a"]])
    assert groups[0].trajectories[0].objectives == {"polite": 7.0}
    with pytest.raises(ValueError, match=r"function 'polit' \(did you mean 'polite'\?\)"):
        load_reward(RewardSpec("polit"))


def test_a_column_that_a_function_needs_must_be_in_the_dataset() -> None:
    with pytest.raises(ValueError, match=r"numeric_match needs .*: 'answer' \(did you mean 'answers'\?\)"):
        Rewards([RewardSpec("numeric_match")], ["level", "answers"])
    Rewards([RewardSpec("numeric_match", params={"answer": [3]})], ["level"]).close()


def test_a_column_may_not_hide_an_argument() -> None:
    with pytest.raises(ValueError, match="the dataset's column 'completions'"):
        Rewards([mine("brevity")], ["completions"])


@pytest.fixture(scope="module")
def two() -> Iterator[Rewards]:
    rewards = Rewards([mine("two_objectives"), mine("brevity", limit=3)], ())
    yield rewards
    rewards.close()


numbers = st.lists(st.integers(-8, 8).map(float), min_size=1, max_size=6)


@given(groups=st.lists(numbers, min_size=2, max_size=6), cut=st.integers(1, 5))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_metrics_do_not_depend_on_how_groups_are_dealt_to_ranks(
    two: Rewards, groups: list[list[float]], cut: int
) -> None:
    def measure(some: list[list[float]]) -> Metrics:
        prompts = [prompt(i, wanted=len(group)) for i, group in enumerate(some)]
        texts = [[str(value) for value in group] for group in some]
        return two.score(prompts, completions_of(prompts, texts), texts, trainer_state={})[1]

    parts = merge([measure(groups[:cut]), measure(groups[cut:])])
    for name, whole in measure(groups).items():
        if not name.startswith("time/"):
            assert parts[name].value == pytest.approx(whole.value), name


def test_mean_and_spread_by_hand() -> None:
    _, metrics = score(
        [mine("two_objectives")], [prompt(1), prompt(2)], [["a", "abc"], ["ab", "ab", "abcde"]]
    )
    assert metrics["reward/mean"] == metrics["reward/length"] == Mean(13.0, 5)
    # population standard deviations: 1 for (1, 3), sqrt(2) for (2, 2, 5)
    assert metrics["reward/std"].value == pytest.approx((1.0 + math.sqrt(2.0)) / 2)
