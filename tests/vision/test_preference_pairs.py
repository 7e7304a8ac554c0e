"""Preference pairs whose prompt has images: read with their pixels, and learned alike in every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from rlhf.algos.preference.table import dpo
from rlhf.collect.pairing import Pairing
from rlhf.config.data import DataConfig
from rlhf.config.pairs import PairsConfig
from rlhf.data.completions import load_offline
from rlhf.metrics import merge
from rlhf.types import Group
from tests.support import learner_of
from tests.vision.support import processor_of, seeing_policy

ASK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def pairs(folder: Path, model: Path) -> list[Group]:
    """The same pair with its prompt in a column and with its prompt in both completions, and one of text."""
    Image.new("RGB", (24, 16), (200, 10, 10)).save(folder / "red.png")
    rows = [
        {"prompt": ASK, "chosen": "red it is", "rejected": "blue", "images": ["red.png"]},
        {"prompt": ASK, "chosen": [*ASK, *answer("red it is")], "rejected": [*ASK, *answer("blue")]},
        {"prompt": "say", "chosen": "yes", "rejected": "no no"},
    ]
    rows[1]["images"], rows[2]["images"] = ["red.png"], []
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    processor = processor_of(model)
    section = DataConfig.model_validate({"train": str(file), "mode": "offline"})
    data = load_offline(
        file, processor.tokenizer, section, max_completion_tokens=32, eos_token_id=2, processor=processor
    )
    return list(data.groups)


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3"])
def test_pairs_with_images_are_learned_alike_in_every_layout(
    tmp_path: Path, tiny_vlm: Callable[[str], Path], family: str
) -> None:
    model = tiny_vlm(family)
    groups = pairs(tmp_path, model)
    apart, joined, text = groups
    assert apart.prompt.token_ids == joined.prompt.token_ids
    assert apart.prompt.images == joined.prompt.images and apart.prompt.images
    assert [t.text for t in joined.trajectories] == ["red it is", "blue"]
    assert not text.prompt.images
    compared, _ = Pairing(PairsConfig(), dpo())(groups)
    losses: list[float] = []
    for packing in ("shared_prefix", "packed", "padded"):
        policy, reference = (seeing_policy(model, packing=packing, dtype=torch.float64) for _ in range(2))
        with torch.no_grad():
            reference.head.module.weight.mul_(1.2)
        learner, builder = learner_of(policy, dpo(), reference)
        experience = builder.build(compared, kl_coef=0.0)
        counts = learner.counts(experience, [0, 1, 2])
        assert counts.comparisons == 3
        losses.append(merge(learner.accumulate(experience, [0, 1, 2], counts, 0.0))["pairs/loss"].value)
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-6)
    assert losses[0] != pytest.approx(0.6931, abs=1e-4)


def test_the_same_words_beside_another_picture_are_another_prompt(
    tmp_path: Path, tiny_vlm: Callable[[str], Path]
) -> None:
    for name, colour in (("red", (200, 10, 10)), ("blue", (10, 10, 200))):
        Image.new("RGB", (24, 16), colour).save(tmp_path / f"{name}.png")
    rows = [{"prompt": ASK, "completion": name, "images": [f"{name}.png"]} for name in ("red", "blue", "red")]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    processor = processor_of(tiny_vlm("qwen2_vl"))
    section = DataConfig.model_validate({"train": str(file), "mode": "offline"})
    data = load_offline(
        file, processor.tokenizer, section, max_completion_tokens=32, eos_token_id=2, processor=processor
    )
    assert [[t.text for t in g.trajectories] for g in data.groups] == [["red", "red"], ["blue"]]
    assert data.splitting == ()
