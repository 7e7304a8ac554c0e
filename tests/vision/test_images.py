"""Where pictures come from, how they get into a prompt, and what is said when one does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as pil

from rlhf.data.prompts import load_prompts
from rlhf.models.pretrained import load_tokenizer
from rlhf.models.vision.images import ImageError, noise, open_picture, separate_pictures, stored
from rlhf.models.vision.masking import mask_patches
from rlhf.types import Images, Mask, Prompt
from tests.vision.support import HIGH, OTHER, WIDE, processor_of, prompt_of
from tests.vision_models import FAMILIES

Folder = Callable[[str], Path]
TEXT = {"type": "text", "text": "what?"}


def same(a: bytes | str, b: bytes | str) -> bool:
    return bool((np.asarray(open_picture(a)) == np.asarray(open_picture(b))).all())


def test_a_path_bytes_a_pil_image_and_a_datasets_image_are_the_same_picture(tmp_path: Path) -> None:
    assert isinstance(WIDE, bytes)
    (tmp_path / "wide.png").write_bytes(WIDE)
    ways = ["wide.png", WIDE, open_picture(WIDE), {"bytes": WIDE, "path": None}, {"path": "wide.png"}]
    assert all(same(stored(way, tmp_path), WIDE) for way in ways)
    assert stored("wide.png", tmp_path) == str(tmp_path / "wide.png")


def test_pictures_stand_in_the_messages_or_beside_them(tmp_path: Path) -> None:
    def user(content: object) -> list[dict[str, object]]:
        return [{"role": "system", "content": "s"}, {"role": "user", "content": content}]

    inside = user([{"type": "image", "image": WIDE}, TEXT, {"type": "image", "image": HIGH}])
    placed = user([{"type": "image"}, TEXT, {"type": "image"}])
    expected = [{"role": "system", "content": [{"type": "text", "text": "s"}]}, placed[1]]
    assert separate_pictures(inside, None, tmp_path) == (expected, (WIDE, HIGH))
    assert separate_pictures(placed, [WIDE, HIGH], tmp_path) == (expected, (WIDE, HIGH))
    assert separate_pictures(user("<image>what?<image>"), [WIDE, HIGH], tmp_path) == (expected, (WIDE, HIGH))
    before = user([{"type": "image"}, {"type": "image"}, TEXT])[1]
    assert separate_pictures(user("what?"), [WIDE, HIGH], tmp_path)[0][1] == before
    # without pictures the mark is text like any other
    assert separate_pictures(user("<image>"), None, tmp_path)[0][1]["content"][0]["type"] == "text"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_has_a_placeholder_for_every_feature(tiny_vlm: Folder, family: str) -> None:
    processor = processor_of(tiny_vlm(family))
    one = prompt_of(processor, "one", "<image>", WIDE)
    two = prompt_of(processor, "two", "<image> and <image>", WIDE, OTHER)
    none = prompt_of(processor, "none", "and")
    counts = [prompt.token_ids.count(processor.image_token_id) for prompt in (one, two, none)]
    if processor.has_axes:
        # 4 x 6 and 6 x 8 patches, four of them one placeholder
        assert counts == [6, 6 + 12, 0]
    else:
        # cut in tiles of four placeholders each, and one of the whole: two rows of two, twice
        assert counts == [5 * 4, 2 * 5 * 4, 0]
    assert none.images is None


def write(folder: Path, *rows: dict[str, object]) -> Path:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def load(file: Path, model: Path, *, seeing: bool = True) -> list[Prompt]:
    return list(
        load_prompts(
            file,
            load_tokenizer(str(model)),
            image_column="images",
            max_prompt_tokens=500,
            processor=processor_of(model) if seeing else None,
        ).prompts
    )


def test_a_dataset_mixes_prompts_with_and_without_pictures(tmp_path: Path, tiny_vlm: Folder) -> None:
    assert isinstance(WIDE, bytes)
    (tmp_path / "wide.png").write_bytes(WIDE)
    rows = [
        {"prompt": [{"role": "user", "content": "<image> or <image>?"}], "images": ["wide.png"] * 2, "n": 1},
        {"prompt": [{"role": "user", "content": "say"}], "images": [], "n": 2},
        {"prompt": "plain", "images": None, "n": 3},
    ]
    prompts = load(write(tmp_path, *rows), tiny_vlm("qwen2_vl"))
    assert [p.images for p in prompts] == [(str(tmp_path / "wide.png"),) * 2, None, None]
    assert [dict(p.columns) for p in prompts] == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert prompts[1].content == [{"role": "user", "content": [{"type": "text", "text": "say"}]}]


def test_what_is_wrong_with_a_picture_is_told_with_its_line(tmp_path: Path, tiny_vlm: Folder) -> None:
    model = tiny_vlm("qwen2_vl")
    assert isinstance(WIDE, bytes)
    (tmp_path / "wide.png").write_bytes(WIDE)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(WIDE[: len(WIDE) // 2])

    def refusal(content: object, images: object, *, seeing: bool = True) -> str:
        good = {"prompt": [{"role": "user", "content": "say"}], "images": []}
        bad = {"prompt": content if isinstance(content, str) else [{"role": "user", "content": content}]}
        with pytest.raises(ValueError) as error:
            load(write(tmp_path, good, bad | {"images": images}), model, seeing=seeing)
        assert str(error.value).startswith(f"{tmp_path / 'train.jsonl'}:2: ")
        return str(error.value)

    words: list[object] = [TEXT]
    assert "there is no image" in refusal(words, ["missing.png"])
    assert "no image that Pillow can read" in refusal(words, ["text.png"])
    assert "cannot be read" in refusal(words, ["cut.png"])
    assert "an image is a path, bytes or a PIL image, got 7" in refusal(words, [7])
    assert "no place for 1 of the 2 images" in refusal([{"type": "image"}, TEXT], ["wide.png"] * 2)
    assert "places for more than 1 images" in refusal([{"type": "image"}] * 2 + [TEXT], ["wide.png"])
    assert "must be chat messages, got text" in refusal("<image>", ["wide.png"])
    assert "neither {'type': 'text'" in refusal([{"type": "video", "video": "x"}], [])
    assert "no image processor" in refusal(words, ["wide.png"], seeing=False)
    assert "no image processor" in refusal([{"type": "image", "image": "wide.png"}], [], seeing=False)
    assert "its text has 2 placeholders for 1 images" in refusal(
        [{"type": "image"}, {"type": "text", "text": "<|image_pad|>"}], ["wide.png"]
    )


def test_a_mask_blackens_whole_patches_at_its_ratio_and_is_a_function_of_its_seed() -> None:
    white = pil.new("RGB", (100 * 14 + 5, 70 * 14), (255, 255, 255))
    hidden = np.asarray(mask_patches(white, Mask(14, 0.6, seed=1), number=0))
    patches = hidden[:, : 100 * 14].reshape(70, 14, 100, 14, 3).swapaxes(1, 2).reshape(7000, -1)
    assert set(np.unique(patches.max(1) - patches.min(1))) == {0}
    # four deviations of a mean of 7000 draws
    assert abs((patches[:, 0] == 0).mean() - 0.6) < 4 * (0.24 / 7000) ** 0.5
    again, other, second = (
        np.asarray(mask_patches(white, Mask(14, 0.6, seed), number=n)) for seed, n in ((1, 0), (2, 0), (1, 1))
    )
    assert (again == hidden).all()
    assert (other != hidden).any()
    assert (second != hidden).any()
    assert (np.asarray(mask_patches(white, Mask(14, 0.0, 1), number=0)) == 255).all()
    assert (np.asarray(mask_patches(white, Mask(14, 1.0, 1), number=0)) == 0).all()


def test_a_patch_of_the_mask_is_a_patch_of_the_model_however_large_the_picture(tiny_vlm: Folder) -> None:
    processor = processor_of(tiny_vlm("qwen2_vl"))
    file = BytesIO()
    pil.new("RGB", (400, 300), (255, 255, 255)).save(file, "PNG")
    images = Images("x", (file.getvalue(),), Mask(4, 0.5, seed=3))
    values = processor.pixels(images).tensors["pixel_values"]
    assert (values.amax(1) - values.amin(1) < 1.0).all(), "some patch is half hidden"
    black = values[:, 0] < 0
    assert 0 < black.sum() < len(black)


def test_a_picture_that_is_gone_is_told_with_its_sample(tmp_path: Path, tiny_vlm: Folder) -> None:
    processor = processor_of(tiny_vlm("qwen2_vl"))
    with pytest.raises(ImageError, match=r"train\.jsonl:7: there is no image .*gone\.png"):
        processor.pixels(Images("train.jsonl:7", (str(tmp_path / "gone.png"),)))


def test_noise_is_the_same_every_time() -> None:
    assert noise(8, 8, 3) == noise(8, 8, 3) != noise(8, 8, 4)
