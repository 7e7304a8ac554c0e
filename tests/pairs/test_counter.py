"""Counterfactual scenes: picture and caption agree by their pixels, and one word is all that differs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlhf.cli import main
from rlhf.pairs.counter import COLOURS, KINDS, NUMBERS, Counter, Scene
from rlhf.pairs.files import PairsError
from tests.support import metrics_of
from tests.vision_models import save_tiny_vlm

CONFIGS = Path(__file__).parents[2] / "configs"
SCENES = [Counter(7, size=size).scene(number) for size in (32, 50) for number in range(60)]


def pixels(picture: Image.Image, colour: str) -> np.ndarray:
    """Where a picture has a colour: `[height, width]` of true and false."""
    return (np.asarray(picture) == COLOURS[colour]).all(-1)


def pieces(found: np.ndarray) -> int:
    """How many connected parts the true pixels have."""
    waiting, count = {(int(y), int(x)) for y, x in np.argwhere(found)}, 0
    while waiting:
        count += 1
        reached = [waiting.pop()]
        while reached:
            y, x = reached.pop()
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & waiting
            waiting -= near
            reached += near
    return count


def seen(scene: Scene) -> str:
    """The word of the caption as the pixels have it."""
    picture = scene.draw()
    if scene.kind == "count":
        [(colour, _)] = scene.things
        return NUMBERS[pieces(pixels(picture, colour))]
    first, second = (np.argwhere(pixels(picture, colour)).mean(0) for colour, _ in scene.things)
    axis = 1 if scene.kind == "left/right" else 0
    return scene.kind.split("/")[int(first[axis] > second[axis])]


@pytest.mark.parametrize("kind", KINDS)
def test_picture_and_caption_agree_by_the_pixels(kind: str):
    scenes = [each for s in SCENES if s.kind == kind for each in (s, s.swapped())]
    assert [seen(scene) for scene in scenes] == [scene.word for scene in scenes]
    assert all(f" {scene.word} " in scene.caption for scene in scenes)
    # every word there is occurs
    assert {scene.word for scene in scenes} == set(NUMBERS.values() if kind == "count" else kind.split("/"))


def test_swapping_twice_is_the_identity_and_once_changes_one_word_and_the_picture():
    for scene in SCENES:
        other = scene.swapped()
        assert other.swapped() == scene
        assert other.question == scene.question
        words, others = scene.caption.split(), other.caption.split()
        [changed] = [pair for pair in zip(words, others, strict=True) if pair[0] != pair[1]]
        assert changed == (scene.word, other.word)
        before, after = (np.asarray(s.draw()) for s in (scene, other))
        assert (before != after).any()
        if scene.kind != "count":
            # the same shapes elsewhere: as many pixels of each colour
            for colour, _ in scene.things:
                assert pixels(scene.draw(), colour).sum() == pixels(other.draw(), colour).sum()


def test_a_scene_by_hand():
    scene = Scene("left/right", (("red", "disc"), ("blue", "square")), ((1, 10), (17, 2)), 32, (0, 0, 0))
    assert scene.question == "Is the red disc left or right of the blue square?"
    assert scene.caption == "The red disc is left of the blue square."
    assert scene.swapped().places == ((17, 10), (1, 2))
    above = Scene("above/below", scene.things, scene.places, 32, (0, 0, 0))
    # 10 is below 2: rows are counted from the top
    assert above.caption == "The red disc is below the blue square."
    assert above.swapped().places == ((1, 2), (17, 10))


def test_scenes_depend_on_seed_and_number_alone():
    assert Counter(1).scene(5) == Counter(1).scene(5) != Counter(2).scene(5)
    assert [Counter(0).scene(n).kind for n in range(4)] == [*KINDS, KINDS[0]]


def test_wrong_options_are_refused():
    with pytest.raises(PairsError, match="expected some of left/right, above/below, count, got colour"):
        Counter(0, ("count", "colour"))
    with pytest.raises(PairsError, match="at least 32 pixels a side, got 16"):
        Counter(0, size=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counter")
    for name, seed in (("train", 0), ("eval", 1)):
        arguments = ["--out", str(folder / name), "--scenes", "6", "--size", "32", "--seed", str(seed)]
        assert main(["pairs", "counter", *arguments]) == 0
    return folder


def test_both_captions_and_both_pictures_are_kept_side_by_side(made: Path):
    lines = [json.loads(line) for line in (made / "train" / "pairs.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    for number in range(6):
        one, other = lines[2 * number : 2 * number + 2]
        assert one["scene"] == other["scene"] == number
        assert (one["chosen"], one["rejected"]) == (other["rejected"], other["chosen"])
        files = [line["prompt"][0]["content"][0]["image"] for line in (one, other)]
        scene = Counter(0, size=32).scene(number)
        for file, expected in zip(files, (scene, scene.swapped()), strict=True):
            with Image.open(made / "train" / file) as picture:
                assert picture.tobytes() == expected.draw().tobytes()


@pytest.mark.parametrize("config", ["dpo", "counter"])
def test_the_pairs_train_by_the_shipped_configs(
    made: Path, tmp_path: Path, tiny_looker: Path, config: str, capsys: pytest.CaptureFixture[str]
):
    shared = [
        f"run_dir={tmp_path / 'run'}",
        f"model.path={tiny_looker}",
        f"data.train={made / 'train' / 'pairs.jsonl'}",
        f"data.eval={made / 'eval' / 'pairs.jsonl'}",
        "reward.functions=[]",
        "data.max_prompt_tokens=160",
        "rollout.max_completion_tokens=60",
        "rollout.prompts_per_step=4",
        "steps=2",
        "learner.lr=1e-2",
        "learner.schedule=constant",
        "learner.warmup_steps=0",
        "model.gradient_checkpointing=false",
    ]
    assert main(["train", str(CONFIGS / f"{config}.yaml"), *shared]) == 0, capsys.readouterr().err
    first, second = metrics_of(tmp_path)
    assert first["pairs/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert second["pairs/loss"] != pytest.approx(0.6931, abs=1e-4)


@pytest.fixture(scope="module")
def tiny_looker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-looker")
    save_tiny_vlm(folder, "qwen2_vl")
    return folder
