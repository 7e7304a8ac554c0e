"""Makes a model with random weights in the shape of a real one, for measurements of speed.

The shapes of Qwen2.5-0.5B and -1.5B (their published configurations), and a tiny one for CPUs.
The tokenizer has one token for each character, and fills the vocabulary with numbered tokens.

Run: `python -m benchmarks.random_model FOLDER --shape 0.5b`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.characters import SPECIAL, tokenizer

SHAPES = {
    "tiny": {"hidden": 64, "inner": 192, "layers": 2, "heads": 4, "kv_heads": 2, "vocabulary": 512},
    "0.5b": {"hidden": 896, "inner": 4864, "layers": 24, "heads": 14, "kv_heads": 2, "vocabulary": 151936},
    "1.5b": {"hidden": 1536, "inner": 8960, "layers": 28, "heads": 12, "kv_heads": 2, "vocabulary": 151936},
}
CHARACTERS = [chr(code) for code in range(32, 127)]


def words(size: int) -> PreTrainedTokenizerFast:
    known = len(SPECIAL) + len(CHARACTERS)
    return tokenizer([*CHARACTERS, *(f"<{number}>" for number in range(known, size))])


def make(folder: Path, shape: str) -> None:
    size = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        dtype="bfloat16",
    )
    model = Qwen2ForCausalLM(config)
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    words(size["vocabulary"]).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a model with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--out", type=Path, help="write what was made as JSON")
    options = parser.parse_args()
    make(options.folder, options.shape)
    if options.out:
        options.out.write_text(json.dumps({"shape": SHAPES[options.shape]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
