"""The pictures of the small cropper, what its words ask for, and the settings and figures of its runs."""

from __future__ import annotations

import random
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from benchmarks.cropper_task import BOXES, calls, seen
from benchmarks.dtpo import ARMS, settings_of, summary
from benchmarks.small_cropper import ANSWERS, COLOURS, draw
from rlhf.config.load import make_config


def colours_of(picture: Image.Image) -> set[tuple[int, int, int]]:
    data = picture.tobytes()
    return {(data[i], data[i + 1], data[i + 2]) for i in range(0, len(data), 3)}


def test_the_small_picture_tells_the_colour_of_readable_questions_alone() -> None:
    rng = random.Random(0)
    questions = [draw(rng, i) for i in range(40)]
    assert {q.answer for q in questions} == set(ANSWERS) and {q.quarter for q in questions} < set(BOXES)
    for question in questions:
        colour = COLOURS[question.answer]
        small, part = colours_of(question.small), colours_of(question.shown(question.quarter))
        # the ground is a dark grey, which the square never is
        [ground] = [rgb for rgb in small & part if max(rgb) < 60]
        # of two pixels with a colour and two with its opposite the mean is 255 / 2, whatever the colour is
        opposite = tuple(255 - value for value in colour)
        hidden = question.kind == "hidden"
        assert small - {ground} == ({(128, 128, 128)} if hidden else {colour})
        assert part - {ground} == ({colour, opposite} if hidden else {colour})
        # the subject is in its quarter
        left, upper, right, lower = BOXES[question.quarter]
        x1, y1, x2, y2 = question.subject
        assert left <= x1 < x2 <= right and upper <= y1 < y2 <= lower


def test_a_call_is_two_words() -> None:
    [call] = calls("crop topright")
    assert call == {"name": "crop", "arguments": {"x1": 0.5, "y1": 0.0, "x2": 1.0, "y2": 0.5}}
    assert [calls(text) for text in ("crop", "red", "crop red", "crop all all")] == [[]] * 4


def test_figures_are_counted_by_the_kind_of_a_question() -> None:
    said = [[{"role": "assistant", "content": word}] for word in ("red", "blue")]
    environments = [SimpleNamespace(box=None), SimpleNamespace(box=[0.0, 0.0, 1.0, 1.0])]
    assert seen(said, ["red", "red"], ["readable", "hidden"], environments) == [
        {"tool_readable": 0.0, "right_readable": 1.0},
        {"tool_hidden": 1.0, "right_hidden": 0.0},
    ]


def test_the_end_of_a_run_is_the_mean_of_its_last_steps() -> None:
    def step(tool: float) -> dict[str, float]:
        figures = {"tool_hidden": tool, "tool_readable": 0.0, "right_hidden": 0.5, "right_readable": 1.0}
        return {f"reward/{name}": value for name, value in figures.items()} | {"time/step": 6.0}

    found = summary("dtpo", 1, [step(0.2), *(step(tool) for tool in (0.8, 0.9, 1.0, 0.9, 0.9))])
    # (.8 + .9 + 1 + .9 + .9) / 5 = .9, and none of the other half
    assert found["last"]["tool_hidden"] == pytest.approx(0.9)
    assert (found["first"]["tool"], found["last"]["tool"], found["last"]["right"]) == (0.1, 0.45, 0.75)
    assert found["minutes"] == 0.6


@pytest.mark.parametrize("arm", ARMS)
def test_the_arms_differ_in_the_algorithm_or_in_one_reward(arm: str, tmp_path: Path) -> None:
    options = Namespace(runs=tmp_path, data=tmp_path, steps=3, lr=1e-3)
    config = make_config(settings_of(arm, 0, options))
    names = [spec.path.rpartition(":")[2] for spec in config.reward.functions]
    assert ("balance" in names) == (arm != "no_balance")
    assert [name for name in names if name != "balance"] == ["right", "inside", "area", "seen"]
    assert config.build_algorithm().objectives == (() if arm == "grpo" else ("inside", "area"))
