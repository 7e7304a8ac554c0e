"""Tiny vision-language models with random weights, and their processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.conftest import SIZES, save_tiny_tokenizer

PATCH = 4
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
IDEFICS_TOKENS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<video>"]
IDEFICS_TOKENS += [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2},
    "qwen2_5_vl": {
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    },
}
FAMILIES = [*QWEN_VISION, "idefics3", "smolvlm"]


def save_tiny_vlm(folder: Path, family: str, **sizes: Any) -> None:
    """Saves a model (float32, seed 0), its tokenizer and its processor. `sizes`: of the language model."""
    qwen = family in QWEN_VISION
    tokens = QWEN_TOKENS if qwen else IDEFICS_TOKENS
    save_tiny_tokenizer(folder)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    place = "<|vision_start|><|image_pad|><|vision_end|>" if qwen else "<image>"
    tokenizer.chat_template = TEMPLATE.replace("PLACE", place)
    tokenizer.save_pretrained(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    text = {**SIZES, "vocab_size": len(tokenizer), "tie_word_embeddings": True, **sizes}
    config = _qwen(family, ids, text) if qwen else _idefics(family, ids, text)
    config.save_pretrained(folder)
    _image_processor(family).save_pretrained(folder)
    if not qwen:
        (folder / "processor_config.json").write_text('{"image_seq_len": 4}')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForImageTextToText.from_config(config).float().save_pretrained(folder)


def _qwen(family: str, ids: dict[str, int], text: dict[str, Any]) -> Any:
    vision = {
        "patch_size": PATCH,
        "spatial_patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        **QWEN_VISION[family],
    }
    vision["hidden_size" if family == "qwen2_vl" else "out_hidden_size"] = text["hidden_size"]
    head = text["hidden_size"] // text["num_attention_heads"]
    section = [head // 2 - 2 * (head // 8), head // 8, head // 8]
    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": section, "rope_theta": 10_000.0}
    if family == "qwen3_vl":
        # as in the released config.json: vLLM reads it, transformers assumes it
        rope["mrope_interleaved"] = True
    return transformers.AutoConfig.for_model(
        family,
        text_config={**text, "head_dim": head, "rope_parameters": rope, "dtype": "float32"},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )


def _idefics(family: str, ids: dict[str, int], text: dict[str, Any]) -> Any:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": PATCH,
    }
    return transformers.AutoConfig.for_model(
        family,
        text_config={**text, "model_type": "llama", "dtype": "float32"},
        vision_config=vision,
        image_token_id=ids["<image>"],
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        dtype="float32",
    )


def _image_processor(family: str) -> Any:
    if family in QWEN_VISION:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        size = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
        return Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size=size)
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    kind = Idefics3ImageProcessorPil if family == "idefics3" else SmolVLMImageProcessorPil
    return kind(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
