"""A tiny, random reward model in the Hugging Face layout: one label is a number, several are objectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.rewards.model import RewardModel
from tests.conftest import SIZES, save_tiny_tokenizer
from tests.rewards.test_hostile import made_of, submit

LABELS = ["politeness", "meaningfulness", "actionability", "safety"]


def save_classifier(folder: Path, labels: list[str]) -> Path:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    size = save_tiny_tokenizer(folder)
    config = AutoConfig.for_model(
        "llama", vocab_size=size, dtype="float32", id2label=dict(enumerate(labels)), **SIZES
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("one"), ["reward"])


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("four"), LABELS)


def test_a_score_does_not_depend_on_the_batch(one: Path) -> None:
    model = RewardModel(str(one))
    prompts, texts = ["Why?", "How so then?", "What?"], ["a", "because of this", "eh"]
    together: Any = model(prompts, texts)
    alone: list[Any] = [model([p], [t])[0] for p, t in zip(prompts, texts, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) == 3


def test_the_score_is_the_models_own_of_the_conversation(one: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    prompt = [{"role": "user", "content": "Why?"}]
    completion = [{"role": "assistant", "content": "So."}]
    tokenizer: Any = AutoTokenizer.from_pretrained(one)
    text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    expected = AutoModelForSequenceClassification.from_pretrained(one)(**ids).logits[0, 0].item()
    assert RewardModel(str(one))([prompt], [completion]) == [pytest.approx(expected, abs=1e-5)]


def test_several_labels_are_objectives_with_weights_of_their_own(four: Path) -> None:
    weights = {"politeness": 0.5, "safety": 2.0}
    params = {"model": str(four), "transform": "sigmoid"}
    with made_of(
        "reward_model", params=params, batch=2, weight=0.25, weights=weights, timeout=60.0
    ) as rewards:
        group = submit(rewards, ["yes", "no", "perhaps"]).result()[0][0]
        assert rewards.weights == {"meaningfulness": 0.25, "actionability": 0.25, **weights}
    for trajectory in group.trajectories:
        scores = trajectory.objectives
        assert list(scores) == LABELS
        assert all(0 < value < 1 for value in scores.values())
        expected = sum({**dict.fromkeys(LABELS, 0.25), **weights}[name] * scores[name] for name in LABELS)
        assert trajectory.reward == pytest.approx(expected)


def test_a_language_model_is_no_reward_model(tiny_model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"is no reward model: .* got \['LlamaForCausalLM'\]"):
        RewardModel(str(tiny_model_dir))
