"""Prompts with pictures for tiny models, and a task whose answer stands in none of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlhf.config.model import ModelConfig
from rlhf.models.loading import load_policy
from rlhf.models.policy import Policy
from rlhf.models.pretrained import load_tokenizer
from rlhf.models.vision.images import noise
from rlhf.models.vision.processor import Processor, load_processor
from rlhf.types import Image, Prompt
from tests.support import ALONE, bandit_settings, make_exact

WIDE, HIGH, OTHER = noise(24, 16, 0), noise(16, 32, 1), noise(32, 24, 2)
# sizes of a language model whose heads vLLM's attention on a CPU takes
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
REWARD = """
def share_of_a(completions, **_):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [text.count("a") / max(1, len(text)) for text in texts]
"""


def processor_of(folder: Path) -> Processor:
    processor = load_processor(str(folder), load_tokenizer(str(folder)))
    assert processor is not None
    return processor


def seeing_policy(folder: Path, *, packing: str = "auto", dtype: torch.dtype = torch.float32) -> Policy:
    section = ModelConfig.model_validate({"path": str(folder), "packing": packing})
    policy = load_policy(section, str(folder), ALONE.device, processor_of(folder))
    if dtype == torch.float64:
        make_exact(policy.model)
    return policy


def prompt_of(processor: Processor, name: str, text: str, *images: Image) -> Prompt:
    """`text` has an `<image>` mark for each picture."""
    messages = [{"role": "user", "content": text}]
    content, sources, ids = processor.prompt(name, messages, list(images) or None, Path())
    return Prompt(name, tuple(ids), content, {}, sources or None)


def mixed_prompts(processor: Processor) -> list[Prompt]:
    """Two pictures, none, one."""
    return [
        prompt_of(processor, "two", "is <image> like <image>?", WIDE, HIGH),
        prompt_of(processor, "none", "say it"),
        prompt_of(processor, "one", "what? <image>", OTHER),
    ]


def picture_settings(folder: Path, model_dir: Path, **changes: Any) -> dict[str, Any]:
    """The bandit-like task with prompts of no, one and two pictures, from files beside the dataset."""
    settings = bandit_settings(folder, model_dir, **changes)
    (folder / "reward.py").write_text(REWARD)
    for name, image in (("wide.png", WIDE), ("high.png", HIGH)):
        assert isinstance(image, bytes)
        (folder / name).write_bytes(image)
    part = {"type": "image", "image": "wide.png"}
    contents = [
        ("see {}", ["wide.png", "high.png"]),
        ([part, {"type": "text", "text": "say {}"}], None),
        ("say {}", None),
    ]
    rows = [
        {
            "prompt": [{"role": "user", "content": json.loads(json.dumps(content).replace("{}", str(i)))}],
            "images": images,
        }
        for i in range(6)
        for content, images in contents
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings["data"]["max_prompt_tokens"] = 200
    return settings
