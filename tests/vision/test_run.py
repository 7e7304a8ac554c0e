"""A run whose prompts have pictures: it trains, resumes within a step, and exports what loads again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf.checkpoints.serialization import pack_images, unpack_images
from rlhf.cli import main
from rlhf.config.load import make_config
from rlhf.learn.buffer import Buffer
from rlhf.models.pretrained import load_model
from rlhf.preflight.describe import describe
from rlhf.preflight.load import load_inputs
from rlhf.types import Group, Images
from tests.support import metrics_of, train, trajectory, unscored
from tests.vision.support import HIGH, WIDE, mixed_prompts, picture_settings, processor_of

Folder = Callable[[str], Path]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_a_model_that_sees_learns_and_is_exported_whole(
    tmp_path: Path, tiny_vlm: Folder, family: str
) -> None:
    settings = picture_settings(tmp_path, tiny_vlm(family), steps=14, checkpoint={"export": True})
    train(settings)
    steps = metrics_of(tmp_path)
    assert steps[-1]["reward/mean"] > 3 * steps[0]["reward/mean"] + 0.02
    assert max(step["mismatch/k3"] for step in steps) < 1e-8
    exported = tmp_path / "run" / "model"
    again, start = (load_model(str(folder), torch.device("cpu")) for folder in (exported, tiny_vlm(family)))
    changed = [
        name
        for (name, new), old in zip(again.named_parameters(), start.parameters(), strict=True)
        if not torch.equal(new, old)
    ]
    assert any("vis" in name for name in changed)
    prompts = [mixed_prompts(processor_of(folder)) for folder in (exported, tiny_vlm(family))]
    assert prompts[0] == prompts[1]


def test_what_is_to_be_seen_is_told_before_the_run(tmp_path: Path, tiny_vlm: Folder) -> None:
    config = make_config(picture_settings(tmp_path, tiny_vlm("qwen2_vl")))
    lines = list(describe(config, load_inputs(config)))
    assert "images       18, in 12 of the 18 prompts" in lines


def test_a_critic_of_its_own_is_refused_for_it_sees_nothing(tmp_path: Path, tiny_vlm: Folder) -> None:
    settings = picture_settings(tmp_path, tiny_vlm("qwen2_vl"), algorithm={"name": "ppo"})
    with pytest.raises(ValueError, match=r"critic\.trunk"):
        load_inputs(make_config(settings))


def test_the_buffer_of_an_interrupted_step_keeps_its_pictures(tiny_vlm: Folder) -> None:
    prompts = mixed_prompts(processor_of(tiny_vlm("qwen2_vl")))
    groups = [Group(p, (trajectory([5, 6], 1.0),)) for p in prompts]
    experience = unscored(groups)
    buffer, other = Buffer(), Buffer()
    buffer.fill(experience, {})
    other.load(buffer.state(), buffer.tensors())
    assert other.experience is not None
    assert other.experience.images == experience.images != ()
    images = (None, Images("ä", (WIDE, "/a/b.png", HIGH)), Images("x", ("c.png",)), None)
    assert unpack_images(pack_images(images)) == images
    assert unpack_images(pack_images(())) == ()


def test_an_adapter_of_a_model_that_sees_is_trained_evaluated_and_exported(
    tmp_path: Path, tiny_vlm: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    settings = picture_settings(
        tmp_path,
        tiny_vlm("qwen2_vl"),
        steps=2,
        model={"lora": {"rank": 4}},
        algorithm={"name": "grpo", "kl": {"coef": 0.1}},
        perception={"coef": 0.02, "patch": 4},
        rollout={"prompts_per_step": 4, "group_size": 4},
        learner={"lr": 1e-2},
    )
    train(settings)
    steps = metrics_of(tmp_path)
    assert max(step["mismatch/k3"] for step in steps) < 1e-8
    assert steps[1]["kl/ref"] > 0 and steps[1]["perception/kl"] > 0
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert main(["export", run, str(out)]) == 0, capsys.readouterr().err
    assert processor_of(out).image_token_id == processor_of(tiny_vlm("qwen2_vl")).image_token_id
    data = ["--data", str(tmp_path / "train.jsonl"), "eval.samples=2", "eval.max_prompts=4"]
    assert main(["eval", run, *data]) == 0, capsys.readouterr().err
    assert "4 prompts x 2 samples" in capsys.readouterr().out
