"""Tags that are special tokens, or that the template opens: rewards see them, or a warning says why not."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.config.load import load_config
from rlhf.inputs import Inputs
from rlhf.models.pretrained import decoded
from rlhf.preflight.describe import warnings
from rlhf.preflight.load import load_inputs
from rlhf.rewards.builtin import format_match

USER = "def score(completions):\n    return [float('<think>' in c[-1]['content']) for c in completions]\n"


@pytest.fixture(scope="module")
def special_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with `<think>` and `</think>` as special tokens, which its template does not use."""
    folder = tmp_path_factory.mktemp("special") / "model"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opening_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template whose generation prompt ends with `<think>`."""
    folder = tmp_path_factory.mktemp("opening") / "model"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n<think>\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def inputs_of(folder: Path, model: Path, functions: list[dict[str, Any]], *more: str) -> tuple[Any, Inputs]:
    (folder / "mine.py").write_text(USER)
    row = {"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    (folder / "mine.yaml").write_text(
        json.dumps(
            {
                "run_dir": str(folder / "run"),
                "steps": 2,
                "model": {"path": str(model)},
                "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 64},
                "reward": {"functions": functions},
                "algorithm": {"name": "grpo"},
                "rollout": {"prompts_per_step": 4, "group_size": 2, "max_completion_tokens": 8},
            }
        )
    )
    config = load_config(str(folder / "mine.yaml"), list(more))
    return config, load_inputs(config)


def said(config: Any, inputs: Inputs, word: str) -> list[str]:
    return [text for text in warnings(config, inputs) if word in text]


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=False)
    return encoded["input_ids"]


def test_a_special_tag_reaches_rewards_only_with_keep_and_ends_never_do(
    tmp_path: Path, special_dir: Path
) -> None:
    own = [{"path": f"{tmp_path}/mine.py:score"}]
    config, inputs = inputs_of(tmp_path, special_dir, own)
    with closing(inputs.rewards):
        tokenizer: Any = inputs.tokenizer
        written = [*ids(tokenizer, "<think>1</think>2"), tokenizer.eos_token_id]
        assert decoded(tokenizer, written, inputs.rewards.dropped_tokens) == "12"
        (text,) = said(config, inputs, "special")
        assert text.startswith("reward functions mention <think>, special tokens of ")
        assert text.endswith("set reward.special_tokens=keep")
    config, inputs = inputs_of(tmp_path, special_dir, own, "reward.special_tokens=keep")
    with closing(inputs.rewards):
        assert decoded(tokenizer, written, inputs.rewards.dropped_tokens) == "<think>1</think>2"
        assert said(config, inputs, "special") == []


@pytest.mark.parametrize(
    ("function", "tags"),
    [
        ({"path": "format_match", "params": {"pattern": ["think", "answer"]}}, "</think>, <think>"),
        ({"path": "format_match", "params": {"pattern": ".*</think>.*"}}, "</think>"),
        ({"path": "numeric_match"}, None),
    ],
)
def test_who_mentions_a_special_tag_is_warned(
    tmp_path: Path, special_dir: Path, function: dict[str, Any], tags: str | None
) -> None:
    config, inputs = inputs_of(tmp_path, special_dir, [function])
    with closing(inputs.rewards):
        texts = said(config, inputs, "special tokens of")
        assert len(texts) == (tags is not None)
        assert all(f"mention {tags}, special" in text for text in texts)


def test_a_format_is_right_where_the_template_opens_its_first_tag(tmp_path: Path, opening_dir: Path) -> None:
    tags = {"path": "format_match", "params": {"pattern": ["think", "answer"]}}
    config, inputs = inputs_of(tmp_path, opening_dir, [tags, {"path": f"{tmp_path}/mine.py:score"}])
    with closing(inputs.rewards):
        params = inputs.rewards.pools[0].spec.params
        assert params == {"opened": "<think>", "pattern": ["think", "answer"]}
        completions = [
            "two\n</think>\n<answer>4</answer>",
            "<think>two</think><answer>4</answer>",
            "</think> 4",
        ]
        assert format_match(completions, **params) == [1.0, 0.0, 0.0]
        (text,) = said(config, inputs, "the prompts end with <think>")
        assert "format_match counts it as written; " in text
        assert text.endswith("mine.py:score must expect completions without it")


def test_a_template_that_opens_another_tag_changes_nothing(tmp_path: Path, opening_dir: Path) -> None:
    tags = {"path": "format_match", "params": {"pattern": ["reason", "answer"]}}
    config, inputs = inputs_of(tmp_path, opening_dir, [tags])
    with closing(inputs.rewards):
        assert "opened" not in inputs.rewards.pools[0].spec.params
        assert said(config, inputs, "the prompts end with") == []
