"""Rewards of single steps: what functions return, the tokens they go to, and what a run makes of it."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rlhf.checkpoints.serialization import group_of, group_state
from rlhf.config.load import make_config
from rlhf.preflight.describe import warnings
from rlhf.preflight.load import load_inputs
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.scoring import Rewards
from rlhf.rewards.steps import Scored, step_rewards
from rlhf.rewards.workers.pool import RewardError
from rlhf.rewards.workers.return_values import WrongReturn, is_finite, read_numbers, read_scores
from rlhf.rollout.episode import Episode
from rlhf.types import Completion, FinishReason, Group, Prompt, VersionSpan
from tests.support import bandit_settings, metrics_of, train, train_interrupted

STEPS = '''
def steps(completions, **_):
    """1 for a line that begins with a, -1 for any other; nothing for a text without lines."""
    scored = []
    for text in completions:
        end, parts = 0, []
        for line in text.splitlines(keepends=True):
            end += len(line)
            parts.append((end, 1.0 if line[0] == "a" else -1.0))
        scored.append({"lines": parts, "length": float(len(text))})
    return scored

def wrong(completions, **_):
    return [[(99, 1.0)] for _ in completions]

def of_letters(completions, **_):
    return [[(i + 1, float(c == "a")) for i, c in enumerate(text)] or 0.0 for text in completions]

class Steps:
    gives_steps = True

    def __call__(self, completions, **_):
        return [[(len(text), 1.0)] for text in completions]
'''


def completion(ids: tuple[int, ...]) -> Completion:
    return Completion("p", 0, ids, (0.0,) * len(ids), FinishReason.STOP, (VersionSpan(0, 0, len(ids)),))


def of_bytes(ids: Any) -> str:
    """A token a byte; 0 is the end of a sequence, which has no text."""
    return bytes(i for i in ids if i).decode(errors="replace")


def scored(file: Path, function: str, *texts: str, **settings: Any) -> Group:
    ids = [(*text.encode(), 0) for text in texts]
    with closing(Rewards([RewardSpec(f"{file}:{function}", workers=1, **settings)], ())) as rewards:
        rewards.decode = of_bytes
        prompt = Prompt("p", (1,), "?")
        state = {"global_step": 0}
        (group,), metrics = rewards.score([prompt], [[*map(completion, ids)]], [texts], trainer_state=state)
    assert metrics["reward/failed"].value == 0
    return group


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("rewards") / "mine.py"
    found.write_text(STEPS)
    return found


def test_a_step_is_rewarded_at_the_token_that_ends_it(file: Path) -> None:
    group = scored(file, "steps", "ab\nb\na", "b", weight=2.0, weights={"length": 0.5})
    one, two = group.trajectories
    # three lines: 1 - 1 + 1 = 1, twice; six characters, half. The last line ends with the end of the sequence
    assert one.objectives == {"lines": 1.0, "length": 6.0} and one.reward == 2 * 1.0 + 0.5 * 6
    assert one.step_rewards == ((2, 2.0), (4, -2.0), (6, 2.0))
    assert (two.reward, two.step_rewards) == (-1.5, ((1, -2.0),))
    # as a checkpoint keeps it
    kept = group_of(json.loads(json.dumps(group_state(group))), {"p": group.prompt})
    assert kept == group


def test_a_character_of_several_tokens_ends_with_the_last_of_them() -> None:
    text = "é!\U0001f600b"
    ids = tuple(text.encode())
    # é has 2 bytes, the face 4: characters 1, 2, 3 and 4 end with the tokens 1, 2, 6 and 7
    steps: Any = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    found = step_rewards([Scored("mine", 1.0, steps)], completion(ids), text, of_bytes)
    assert found == ((1, 1.0), (2, 2.0), (6, 3.0), (7, 4.0))
    # steps of two objectives that end with one token add up
    twice = [Scored("mine", 1.0, steps[:1]), Scored("other", -0.5, steps[:1])]
    assert step_rewards(twice, completion(ids), text, of_bytes) == ((1, 0.5),)


def test_a_step_outside_of_the_text_and_steps_of_an_episode_are_refused_by_name(file: Path) -> None:
    with pytest.raises(RewardError, match=r"wrong: a step ends behind character 99, .* has 2: 'ab'"):
        scored(file, "wrong", "ab")
    turns = (completion((97,)),)
    episode = Episode(prompt=Prompt("p", (1,), "?"), index=0, turns=turns, finish_reason=FinishReason.STOP)
    with pytest.raises(RewardError, match="gives rewards to steps of a completion, and this is an episode"):
        step_rewards([Scored("mine", 1.0, [(1, 1.0)])], episode, "a", of_bytes)


def test_what_is_a_step_and_what_is_not() -> None:
    assert read_scores([(3, 1), [5, 0.5]], "x") == {"x": [(3, 1.0), (5, 0.5)]}
    assert not is_finite({"x": [(3, 1.0), (5, float("nan"))]})
    assert not is_finite({"x": [(3, 1e308), (5, 1e308)]})
    for value in ([1.0, 2.0], [(1, 2, 3)], [(0.5, 1.0)], [(True, 1.0)], ["ab"]):
        with pytest.raises(WrongReturn, match="must return for each step where it ends in the text"):
            read_scores(value, "x")
    # an environment gives a number for the whole episode
    with pytest.raises(WrongReturn, match="must return numbers"):
        read_numbers([(3, 1.0)], "x")


def settings(tmp_path: Path, model: Path, file: Path, function: str, **changes: Any) -> dict[str, Any]:
    made = bandit_settings(tmp_path, model, algorithm={"name": "grpo_ps"}, **changes)
    return made | {"reward": {"functions": [{"path": f"{file}:{function}"}]}}


def test_a_run_learns_from_steps_and_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, tiny_model_dir: Path, file: Path
) -> None:
    made = settings(tmp_path, tiny_model_dir, file, "of_letters", steps=8)
    made |= {"replay": {"groups_per_step": 2, "max_age": 2}, "checkpoint": {"export": False, "every": 0}}
    train(made)
    straight = metrics_of(tmp_path)
    assert straight[-1]["reward/mean"] > straight[0]["reward/mean"] + 0.4
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    sample = next(c for c in json.loads(lines[-1])["completions"] if c["text"])
    assert len(sample["step_rewards"]) == len(sample["text"])
    assert sum(reward for _, reward in sample["step_rewards"]) == sample["reward"]
    # one for each token, as they differ
    assert len(sample["advantage"]) == sample["num_tokens"]
    made["run_dir"] = str(tmp_path / "again" / "run")
    train_interrupted(made, after=4)
    made["checkpoint"] |= {"resume": "auto"}
    train(made)
    names = ("reward/mean", "grad_norm", "advantage/zero_fraction")
    again = metrics_of(tmp_path / "again")
    assert [[step[n] for n in names] for step in again] == [[step[n] for n in names] for step in straight]


def test_what_an_algorithm_makes_of_steps_is_said_before_the_run(
    tmp_path: Path, tiny_model_dir: Path, file: Path
) -> None:
    made = settings(tmp_path, tiny_model_dir, file, "Steps")
    for name, count in (("grpo_ps", 0), ("rloo", 1)):
        config = make_config(made | {"algorithm": {"name": name}})
        inputs = load_inputs(config)
        said = [line for line in warnings(config, inputs) if "gives rewards to single steps" in line]
        inputs.rewards.close()
        assert len(said) == count
        assert all("Steps gives rewards to single steps, but rloo has one advantage" in s for s in said)


def test_without_any_step_there_is_nothing_to_compare(tmp_path: Path, tiny_model_dir: Path) -> None:
    made = bandit_settings(tmp_path, tiny_model_dir, algorithm={"name": "grpo_ps"}, steps=1)
    with pytest.raises(RewardError, match=r"no completion of this step has rewards of single steps"):
        train(made)
