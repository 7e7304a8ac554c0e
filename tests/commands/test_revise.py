"""`rlhf eval --revise`: each round asks behind the last answer alone, and rewards see the first question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.collect.sampler import Sampler
from rlhf.commands.revise import Revision, describe_revision, measure_revision, revised
from rlhf.config.rollout import RolloutConfig
from rlhf.config.section import ConfigError
from rlhf.data.revision import Reviser
from rlhf.models.pretrained import load_tokenizer
from rlhf.rollout.engine import RolloutRequest
from rlhf.types import Completion, FinishReason, Group, Prompt
from tests.support import group


class Recorded(Sampler):
    """Answers every request with its number; keeps what was asked, and which prompts rewards saw."""

    asked: list[RolloutRequest]
    scored: list[tuple[int, ...]]

    def __init__(self) -> None:
        values: dict[str, Any] = {"section": RolloutConfig(), "seed": 0, "asked": [], "scored": []}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def generate(self, requests: Sequence[RolloutRequest], *_: object) -> Any:
        self.asked.extend(requests)
        numbers = range(1, 1 + len(requests))
        return [[Completion("x", 0, (n,), None, FinishReason.STOP, versions=())] for n in numbers]

    def score(self, prompts: Sequence[Prompt], completions: Any, step: int) -> Any:
        self.scored.extend(p.token_ids for p in prompts)
        assert all([c.index for c in own] == list(range(len(own))) for own in completions)
        ids = [[list(c.token_ids) for c in own] for own in completions]
        return [group(p.id, [7], own, [1.0] * len(own)) for p, own in zip(prompts, ids, strict=True)], {}


def test_each_answer_is_asked_for_anew_behind_its_prompt_and_itself(tiny_model_dir: Path):
    tokenizer: Any = load_tokenizer(str(tiny_model_dir))
    ask = tuple(tokenizer("Better?", add_special_tokens=False)["input_ids"])
    reviser = Reviser(tokenizer, "Better?", frozenset({tokenizer.eos_token_id}))
    sampler = Recorded()
    groups = [group("p", [7], [[3], [4, 5]], [1.0, 0.0]), group("q", [8, 9], [[6]], [0.0])]
    after = revised(sampler, reviser, groups, 2)
    asked = [r.prompt.token_ids for r in sampler.asked]
    assert asked == [(7, 3, *ask), (7, 4, 5, *ask), (8, 9, 6, *ask)]
    assert {r.params.n for r in sampler.asked} == {1}
    # a draw of its own for each
    assert len({r.prompt.id for r in sampler.asked}) == len({r.params.seed for r in sampler.asked}) == 3
    assert sampler.scored == [(7,), (8, 9)]
    assert [[t.token_ids for t in g.trajectories] for g in after] == [[(1,), (2,)], [(3,)]]


class Judged(Recorded):
    """Gives the answer n (as by `Recorded`) the objective of `gaps[n - 1]`."""

    gaps: list[float]
    references: list[str]

    def score(self, prompts: Sequence[Prompt], completions: Any, step: int) -> Any:
        self.references.extend(p.columns["reference"] for p in prompts)
        made: list[Group] = []
        for prompt, [answer] in zip(prompts, completions, strict=True):
            gap = self.gaps[answer.token_ids[0] - 1]
            [t] = group(prompt.id, [7], [[30 + answer.token_ids[0]]], [gap]).trajectories
            made.append(Group(prompt, (replace(t, text=f"new {gap}", objectives={"gap": gap}),)))
        return made, {}


def test_an_answer_is_improved_as_long_as_that_is_better(tiny_model_dir: Path):
    """Two answers to one prompt: the revision of the first has the gap 1, that of the second -1."""
    tokenizer: Any = load_tokenizer(str(tiny_model_dir))
    reviser, sampler = Reviser(tokenizer, "?", frozenset({tokenizer.eos_token_id})), Judged()
    for name, value in (("gaps", [1.0, -1.0]), ("references", [])):
        object.__setattr__(sampler, name, value)
    prompt = Prompt("p", (7, 9, 9), "x", {"reference": "of the data"}, question_tokens=1)
    both = group("p", [7], [[3], [4, 5]], [0.5, 0.5]).trajectories
    start = [Group(prompt, tuple(replace(t, text=f"old {t.token_ids}") for t in both))]
    [after] = once = revised(sampler, reviser, start, 1, while_above="gap")
    # behind the question alone, and each compared with the answer that it is to improve
    (ask,) = tokenizer("?", add_special_tokens=False)["input_ids"]
    assert [r.prompt.token_ids for r in sampler.asked] == [(7, 3, ask), (7, 4, 5, ask)]
    assert sampler.references == ["old (3,)", "old (4, 5)"]
    assert [t.text for t in after.trajectories] == ["new 1.0", "old (4, 5)"]
    # the second one stands, and is asked about no more; then the first one stands too
    sampler.gaps[0] = 0.0
    sampler.asked.clear()
    [after] = twice = revised(sampler, reviser, once, 2, while_above="gap")
    assert [r.prompt.token_ids for r in sampler.asked] == [(7, 31, ask)]
    assert [t.text for t in after.trajectories] == ["new 1.0", "old (4, 5)"]
    sampler.asked.clear()
    assert revised(sampler, reviser, twice, 3, while_above="gap") == twice and not sampler.asked
    with pytest.raises(ConfigError, match="no reward function gives 'other'; there is gap"):
        revised(sampler, reviser, start, 1, while_above="other")


def test_the_figures_of_a_round_by_hand():
    def written(ids: list[list[int]], rewards: list[float | None]) -> list[Group]:
        made = group("p", [7], ids, rewards)
        texts = tuple(replace(t, text=str(t.token_ids)) for t in made.trajectories)
        return [replace(made, trajectories=texts)]

    before = written([[3], [4, 5], [6]], [1.0, 0.0, 0.0])
    after = written([[3], [4, 5, 6], [6, 7]], [1.0, 0.5, None])
    found = measure_revision(before, after, [True, False, False])
    assert found.accuracy == 1 / 3 and found.reward == 0.75 and found.mean_tokens == 2.0
    assert found.changed == 2
    said = describe_revision(3, Revision(0.25, None, 1, 2.0, [["a", "b"], ["c"]]))
    assert said == "revision 3   accuracy 0.2500, reward none, 1 of 3 answers changed, 2.0 tokens"


def test_a_run_is_revised_round_by_round(finished_run: Path, tmp_path: Path, capsys):
    out = tmp_path / "out.json"
    command = ["eval", str(finished_run), "--revise", "2", "--out", str(out), "eval.samples=2"]
    command += ["eval.max_prompts=3", "data.improve_prompt=' more:'"]
    assert main(command) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "revision 1   accuracy" in said and "revision 2   accuracy" in said
    rounds = json.loads(out.read_text())["revisions"]
    assert [len(r["texts"]) for r in rounds] == [3, 3] and {len(t) for t in rounds[0]["texts"]} == {2}
    # the reward is the share of the letter a
    shares = [text.count("a") / max(1, len(text)) for texts in rounds[1]["texts"] for text in texts]
    assert abs(rounds[1]["reward"] - sum(shares) / 6) < 1e-6
    assert rounds[1]["changed"] > 0
