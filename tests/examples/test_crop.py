"""The crop tool and the rewards of AdaptVision, by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from rlhf.config.environment import EnvironmentConfig
from rlhf.environments.pool import EnvironmentPool
from rlhf.environments.protocol import Reply
from rlhf.plugins import load_object

FOLDER = Path(__file__).parents[2] / "examples" / "crop"
CROP: Any = load_object(f"{FOLDER / 'environment.py'}:Crop")
RIGHT, WRONG = [{"role": "assistant", "content": "It is Red."}], [{"role": "assistant", "content": "blue"}]


def reward(name: str) -> Any:
    return load_object(f"{FOLDER / 'reward.py'}:{name}")


def opened(folder: Path) -> Any:
    Image.new("RGB", (1000, 400), "red").save(folder / "large.png")
    crop = CROP()
    crop.reset(str(folder / "large.png"))
    return crop


def test_a_part_is_shown_in_full_resolution_and_never_too_large(tmp_path: Path) -> None:
    crop = opened(tmp_path)
    image, words = crop.crop(0.5, 0.25, 0.75, 0.75)
    assert image["image"].size == (250, 200) and words["type"] == "text"
    assert crop.box == [0.5, 0.25, 0.75, 0.75]
    whole, _ = crop.crop(0.0, 0.0, 1.0, 1.0)
    # 1000 x 400 in the ratio of 448 to 1000
    assert whole["image"].size == (448, 179)
    with pytest.raises(ValueError, match="expected 0 <= x1 < x2 <= 1"):
        crop.crop(0.6, 0.0, 0.5, 1.0)


def test_the_policy_gets_the_picture(tmp_path: Path) -> None:
    opened(tmp_path)
    replies: list[Any] = []
    pool = EnvironmentPool(EnvironmentConfig(path=(f"{FOLDER / 'environment.py'}:Crop",), workers=1))
    try:
        (tool,) = pool.tools("Crop")
        assert tool["function"]["name"] == "crop"
        pool.begin("a", "Crop", {"large": str(tmp_path / "large.png")}, 0, replies.append)
        call = '<tool_call>{"name": "crop", "arguments": {"x1": 0, "y1": 0, "x2": 0.5, "y2": 1}}</tool_call>'
        while not replies:
            pass
        pool.respond("a", [{"role": "assistant", "content": call}], replies.append)
        while len(replies) < 2:
            pass
    finally:
        pool.close()
    assert isinstance(replies[1], Reply)
    ((image, words),) = [message["content"] for message in replies[1].messages]
    assert image["image"].startswith(b"\x89PNG") and words["text"] == "the part that you asked for"


def test_rewards_by_hand() -> None:
    box, subject = [0.25, 0.25, 0.5, 0.5], [0.3, 0.3, 0.4, 0.4]
    boxes = [None, box, [0.0, 0.0, 1.0, 0.5], box, [0.6, 0.6, 0.7, 0.7]]
    environments = [SimpleNamespace(box=b) for b in boxes]
    completions = [RIGHT, RIGHT, RIGHT, WRONG, RIGHT]
    given: dict[str, Any] = {
        "completions": completions,
        "answer": ["red"] * 5,
        "environments": environments,
        "subject": [subject] * 5,
    }
    assert reward("right")(**given) == [1.0, 1.0, 1.0, 0.0, 1.0]
    # a quarter of the right answers is direct, which is not below a fifth
    assert reward("balance")(**given) == [0.0, -0.1, -0.1, 0.0, -0.1]
    assert reward("inside")(**given) == [0.0, 1.0, 1.0, 1.0, 0.0]
    # areas .0625 and .5 of right answers with the subject in them: mean .28125, .5 / .28125 - 1 = .7778
    assert reward("area")(**given) == pytest.approx([0.0, 0.0, 0.5 / 0.28125 - 1, 0.0, 0.0])
    # one of six: below a fifth, so that the direct answer pays too
    more = {**given, "completions": [*completions, RIGHT, RIGHT], "answer": ["red"] * 7}
    more |= {"environments": [*environments, SimpleNamespace(box=box), SimpleNamespace(box=box)]}
    assert reward("balance")(**more) == [-0.1, -0.1, -0.1, 0.0, -0.1, -0.1, -0.1]
