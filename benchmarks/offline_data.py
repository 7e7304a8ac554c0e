"""Makes an offline dataset of mixed quality: completions at several temperatures, rewards with noise.

The task: use three given words in one sentence; the reward is the share of them that is used, halved where
the sentence does not end (examples/offline/reward.py). Of each prompt there are two completions at each of
the temperatures 0.7, 1.0 and 1.3, from good ones to nonsense. A fifth of the rewards are replaced by that of
another completion, drawn at random: noise that leaves their distribution unchanged. Prompts of the held-out
file use triples of words that the training file does not have.

`python -m benchmarks.offline_data --model MODEL_FOLDER --out examples/offline` writes the set in
the repository, from SmolLM2-135M-Instruct (3 minutes on one core).

The tiny model has one token for each word. It is taught first, by supervised steps on made-up
sentences in which each word is a wanted one with a probability of 0, 0.2 or 0.5.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.offline.reward import one
from rlhf.distributed.world import derive_seed
from rlhf.models.pretrained import load_tokenizer
from rlhf.rollout.engine import RolloutRequest, SamplingParams, generate
from rlhf.rollout.native.engine import NativeEngine
from rlhf.types import Prompt

# fmt: off
WORDS = [
    "river", "lamp", "gold", "horse", "bread", "winter", "letter", "garden", "mirror", "stone", "music",
    "window", "forest", "clock", "silver", "bridge", "apple", "storm", "candle", "island", "shadow", "rope",
    "ocean", "kettle",
]
FILLERS = [
    "the", "a", "old", "small", "and", "near", "of", "with", "in", "by", "we", "you", "they", "saw",
    "made", "found", "lost", "left", "kept", "gave", "new", "red", "cold", "warm", "slow", "quick", "good",
    "soft", "day", "night", "road", "hill", "fire", "rain", "snow", "wind",
]
# fmt: on
TEMPERATURES = (0.7, 1.0, 1.3)
EACH = 2
NOISE = 0.2
CHAT = "Use the words {0}, {1} and {2} in one sentence of at most 12 words."
PLAIN = "use {0} {1} {2} :"

Row = dict[str, Any]


def triples(count: int, seed: int) -> list[list[str]]:
    """Different sets of three words, in random order."""
    rng, found = random.Random(seed), dict[frozenset[str], list[str]]()
    while len(found) < count:
        words = rng.sample(WORDS, 3)
        found.setdefault(frozenset(words), words)
    return list(found.values())


def prompt_of(words: Sequence[str], *, chat: bool) -> Any:
    return [{"role": "user", "content": CHAT.format(*words)}] if chat else PLAIN.format(*words)


def sample(model: Path, wanted: list[list[str]], *, chat: bool, seed: int, max_tokens: int) -> list[Row]:
    """Samples `EACH` completions of each prompt at each temperature, by the native rollout engine."""
    from transformers import AutoModelForCausalLM

    tokenizer: Any = load_tokenizer(str(model))
    engine = NativeEngine(
        AutoModelForCausalLM.from_pretrained(model).eval(), eos_token_ids=(tokenizer.eos_token_id,)
    )
    rows: list[Row] = []
    for first in range(0, len(wanted), 16):
        some = [(w, t) for w in wanted[first : first + 16] for t in TEMPERATURES]
        requests = [
            RolloutRequest(
                Prompt(f"{first}.{i}", token_ids(tokenizer, prompt_of(words, chat=chat)), ""),
                SamplingParams(EACH, max_tokens, seed=derive_seed(seed, first, i), temperature=temperature),
            )
            for i, (words, temperature) in enumerate(some)
        ]
        for (words, _), completions in zip(some, generate(engine, requests), strict=True):
            for completion in completions:
                text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
                row: Row = {"prompt": prompt_of(words, chat=chat), "words": words, "completion": text}
                rows.append(row | {"finish_reason": str(completion.finish_reason)})
    return [row for row in rows if row["completion"]]


def token_ids(tokenizer: Any, prompt: Any) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def with_noisy_rewards(rows: list[Row], seed: int) -> list[Row]:
    rng = random.Random(seed)
    true = [one(row["completion"], row["words"]) for row in rows]
    noisy = [rng.choice(true) if rng.random() < NOISE else reward for reward in true]
    return [row | {"reward": round(reward, 4)} for row, reward in zip(rows, noisy, strict=True)]


def write(file: Path, rows: Sequence[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_set(
    folder: Path, model: Path, *, chat: bool, prompts: int, held_out: int, seed: int, max_tokens: int
) -> None:
    """train.jsonl, best.jsonl (the best completion of each prompt, by the noisy reward) and eval.jsonl."""
    wanted = triples(prompts + held_out, seed)
    rows = sample(model, wanted[:prompts], chat=chat, seed=seed, max_tokens=max_tokens)
    rows = with_noisy_rewards(rows, seed)
    best: dict[str, Row] = {}
    for row in rows:
        key = " ".join(row["words"])
        if key not in best or row["reward"] > best[key]["reward"]:
            best[key] = row
    write(folder / "train.jsonl", rows)
    write(folder / "best.jsonl", list(best.values()))
    write(folder / "eval.jsonl", [{"prompt": prompt_of(w, chat=chat), "words": w} for w in wanted[prompts:]])


def lesson(count: int, seed: int) -> list[Row]:
    """The sentences that the tiny model is taught: eight words and a full stop, of three qualities."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for _ in range(count):
        words, share = rng.sample(WORDS, 3), rng.choice((0.0, 0.2, 0.5))
        said = [rng.choice(words if rng.random() < share else FILLERS) for _ in range(8)]
        rows.append({"prompt": PLAIN.format(*words), "completion": " ".join([*said, "."]), "reward": 1.0})
    return rows


def save_tiny_model(folder: Path, seed: int) -> None:
    """Two layers of random weights and a tokenizer with a token a word, in the Hugging Face layout."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, "use", ":", ".", *WORDS, *FILLERS])}
    backend: Any = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=160)
    options = parser.parse_args()
    write_set(
        options.out, options.model, chat=True, prompts=options.prompts, held_out=32, seed=0, max_tokens=32
    )


if __name__ == "__main__":
    main()
