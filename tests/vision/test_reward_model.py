"""Reward models that see: their scores are those of the model's own forward, in training and as a reward."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from rlhf import cli
from rlhf.algos.reward_model import bradley_terry
from rlhf.config.load import make_config
from rlhf.config.reward_model import RewardModelConfig
from rlhf.models.pretrained import load_model
from rlhf.preflight.load import load_inputs
from rlhf.reward_model.learner import Batch, RewardModelLearner
from rlhf.reward_model.trainer import RewardModelTrainer
from rlhf.rewards.judges.models import PairRewards
from rlhf.rewards.model import RewardModel
from rlhf.types import Prompt
from tests.support import ALONE, metrics_of, reward_model_settings, train
from tests.vision.support import HIGH, WIDE, picture_settings, processor_of
from tests.vision_models import FAMILIES

Folder = Callable[[str], Path]
ASK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
TWO = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "same?"}]}]
SAY = [{"role": "user", "content": "say"}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def write_pairs(folder: Path) -> None:
    """Prompts of one and of two images, one that stands in both completions, and one without an image."""
    for name, color, size in (("red", (200, 10, 10), (24, 16)), ("blue", (10, 10, 200), (16, 32))):
        Image.new("RGB", size, color).save(folder / f"{name}.png")
    rows: list[dict[str, Any]] = [
        {"prompt": ASK, "chosen": "red it is", "rejected": "blue", "images": ["red.png"]},
        {"prompt": ASK, "chosen": "blue", "rejected": "red it is", "images": ["blue.png"]},
        {"prompt": TWO, "chosen": "no", "rejected": "yes", "images": ["red.png", "blue.png"]},
        {
            "prompt": ASK,
            "chosen": [*ASK, *answer("red")],
            "rejected": [*ASK, *answer("it is blue")],
            "images": ["red.png"],
        },
        {"prompt": SAY, "chosen": "yes", "rejected": "no no", "images": []},
    ]
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def made(folder: Path, model_dir: Path, **changes: Any) -> RewardModelTrainer:
    write_pairs(folder)
    settings = reward_model_settings(folder, model_dir, steps=2, **changes)
    settings["data"]["max_prompt_tokens"] = 200
    return RewardModelTrainer(RewardModelConfig.model_validate(settings))


def own_state(model: Any, model_dir: Path, prompt: Prompt, completion: Sequence[int]) -> Tensor:
    """The last hidden state by the model's own forward over ids and pixels of one sequence."""
    ids = torch.tensor([[*prompt.token_ids, *completion]])
    inputs: dict[str, Tensor] = {}
    if prompt.pictures is not None:
        inputs = processor_of(model_dir).inputs(prompt.pictures, prompt.token_ids)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, len(completion)))
    return model(input_ids=ids, output_hidden_states=True, **inputs).hidden_states[-1][0, -1]


def arguments(trainer: RewardModelTrainer) -> dict[str, Any]:
    """Both completions of every example, as a reward function gets them."""
    sides = [(e, side) for e in trainer.held_out for side in (0, 1)]
    return {
        "prompts": [e.prompt.content for e, _ in sides],
        "completions": [answer(e.texts[side]) for e, side in sides],
        "images": [list(e.prompt.images or ()) for e, _ in sides],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_models_own_forward(tmp_path: Path, tiny_vlm: Folder, family: str) -> None:
    trainer = made(tmp_path, tiny_vlm(family))
    trainer.run()
    ours = trainer.learner.scores(trainer.held_out)[:, 0]
    saved = tmp_path / "run" / "model"
    model, head = load_model(str(saved), torch.device("cpu")), load_file(saved / "score.safetensors")
    with torch.no_grad():
        own = torch.stack(
            [
                own_state(model, saved, e.prompt, completion) @ head["score.weight"][0]
                for e in trainer.held_out
                for completion in e.completions
            ]
        )
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    served = RewardModel(str(saved))
    found: Any = served(**arguments(trainer))
    assert found == pytest.approx(own.tolist(), abs=1e-5)
    # the first two prompts differ by their image alone
    assert trainer.held_out[0].texts == trainer.held_out[1].texts[::-1]
    assert abs(found[0] - found[3]) > 1e-3
    with pytest.raises(ValueError, match="places for more than 0 images"):
        served(**{**arguments(trainer), "images": None})


def test_the_gradient_is_that_of_the_models_own_forward(tmp_path: Path, tiny_vlm: Folder) -> None:
    folder = tiny_vlm("qwen3_vl")
    trainer = made(tmp_path, folder, score={"lm_coef": 0.0})
    with trainer.open():
        learner = trainer.learner
        assert isinstance(learner, RewardModelLearner)
        torch.nn.init.normal_(learner.model.head.weight, generator=torch.Generator().manual_seed(0))
        head, examples = learner.model.head.weight.detach().clone(), trainer.train
        for micro in learner.microbatches(examples):
            learner.accumulate(micro, Batch(examples, 0))
    model: Any = load_model(str(folder), ALONE.device)
    losses: list[Tensor] = []
    for example in trainer.train:
        w, l = (own_state(model, folder, example.prompt, c) @ head[0] for c in example.completions)  # noqa: E741
        losses.append(bradley_terry(w[None], l[None]).sum() / len(trainer.train))
    torch.stack(losses).sum().backward()
    want = dict(model.named_parameters())
    compared = 0
    for name, parameter in learner.model.policy.model.named_parameters():
        if want[name].grad is not None and want[name].grad.abs().max() > 0:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, want[name].grad, rtol=1e-4, atol=1e-6)
            compared += "visual" in name
    assert compared > 10, "the vision tower learns"


def test_a_gate_reads_the_image_of_the_prompt(tmp_path: Path, tiny_vlm: Folder) -> None:
    write_pairs(tmp_path)
    rated = [
        {"prompt": ASK, "images": [f"{c}.png"], "completion": "a" * n, "ratings": {"a": n, "b": n % 2}}
        for n in range(1, 6)
        for c in ("red", "blue")
    ]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    score = {"kind": "gated", "objectives": ["a", "b"], "gate": {"width": 8, "layers": 1}}
    data = {"ratings": str(tmp_path / "rated.jsonl")}
    trainer = made(tmp_path, tiny_vlm("smolvlm"), score=score, data=data)
    trainer.run()
    served, logged = RewardModel(str(tmp_path / "run" / "model")), dict[str, Any]()
    found: Any = served(**arguments(trainer), log_extra=logged.__setitem__)
    ours = trainer.learner.scores(trainer.held_out)[:, 0]
    assert [sum(scores.values()) for scores in found] == pytest.approx(ours.tolist(), abs=1e-4)
    assert logged["gate"][0] != logged["gate"][2], "prompts that differ by their image"


def test_a_policy_that_sees_is_scored_with_its_images(tmp_path: Path, tiny_vlm: Folder) -> None:
    """The reward model is of another family than the policy."""
    trainer = made(tmp_path, tiny_vlm("idefics3"))
    trainer.run()
    model = str(tmp_path / "run" / "model")
    judge = PairRewards(model)
    pair: Any = [answer("a"), answer("b")]
    image = (tmp_path / "red.png").read_bytes()
    assert judge([ASK], [pair], [[image]])[0] + judge([ASK], [pair[::-1]], [[image]])[0] == pytest.approx(1)
    function = {"path": "reward_model", "params": {"model": model}, "batch": 16, "memory_gib": 16.0}
    policy = tmp_path / "policy"
    policy.mkdir()
    settings = picture_settings(policy, tiny_vlm("qwen2_vl"), steps=1, reward={"functions": [function]})
    train(settings | {"rollout": {"prompts_per_step": 3, "group_size": 2, "max_completion_tokens": 4}})
    (metrics,) = metrics_of(policy)
    assert metrics["reward/failed"] == 0
    lines = (policy / "run" / "samples.jsonl").read_text().splitlines()
    served, images = RewardModel(model), {0: [WIDE, HIGH], 1: [WIDE], 2: []}
    seen = 0
    for group in map(json.loads, lines):
        # lines of the dataset take turns: two images, one, none
        own = images[(int(group["prompt_id"].rpartition(":")[2]) - 1) % 3]
        seen += len(own)
        sampled = group["completions"]
        texts, prompts = [answer(c["text"]) for c in sampled], [group["prompt"]] * len(sampled)
        want = served(prompts, texts, images=[own] * len(sampled))
        assert [c["reward"] for c in sampled] == pytest.approx(want, abs=1e-5)
    assert seen, "prompts of the sample have images"


def test_a_model_without_eyes_is_refused_by_the_check(
    tmp_path: Path, tiny_vlm: Folder, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path)
    settings = reward_model_settings(tmp_path, tiny_model_dir)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert cli.main(["check", str(tmp_path / "config.json")]) != 0
    told = " ".join(capsys.readouterr().err.split())
    assert "train.jsonl:1: the prompt has images, but the model has no image processor" in told
    sharded = reward_model_settings(tmp_path, tiny_vlm("qwen2_vl"), distributed={"mode": "sharded"})
    sharded["data"]["max_prompt_tokens"] = 200
    with pytest.raises(ValueError, match="models that take images cannot be sharded"):
        RewardModelTrainer(RewardModelConfig.model_validate(sharded))
    function = {"path": "reward_model", "params": {"model": str(tiny_model_dir)}}
    blind = picture_settings(tmp_path, tiny_vlm("qwen2_vl"), reward={"functions": [function]})
    with pytest.raises(ValueError, match="the model of reward_model, reads text alone"):
        load_inputs(make_config(blind))
