"""Makes a small vision model that prefers to guess from the words, and images that often agree with it.

Each question names a thing that most images show in its usual form: apples are red, wheels are four,
the sun is at the top left. FOLDER/model is a Qwen2-VL of about 0.2 million weights, taught by supervised
steps on images of which nine in ten show the usual form, and stopped when it is correct about two in five of
the others. Three in four images of FOLDER/train.jsonl show the usual form, and half of those of
FOLDER/eval.jsonl; the other half contradicts the words.

Run: `python -m benchmarks.small_looker FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.nn import functional as F
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rlhf.models.pretrained import load_tokenizer
from rlhf.models.vision.processor import load_processor

# a cell of the grid is one placeholder: 2 by 2 patches
SIDE, CELL, PATCH = 16, 8, 4
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (235, 215, 50)}
PLACES = ("topleft", "topright", "bottomleft", "bottomright")
COUNTS = ("one", "two", "three", "four")
# question -> thing -> what it usually is
USUAL = {
    "colour": dict(zip(("apple", "leaf", "sea", "lemon"), COLOURS, strict=True)),
    "count": dict(zip(("nose", "eyes", "lights", "wheels"), COUNTS, strict=True)),
    "place": dict(zip(("sun", "moon", "shoe", "root"), PLACES, strict=True)),
}
LESSONS, BATCH, LR, ENOUGH = 600, 64, 3e-3, 0.4
# smoothing of labels: a model without any doubt would sample groups of five equal answers
SMOOTHING = 0.2
POOL = 1536
TRAIN, HELD_OUT = 480, 360
SPECIAL = ["<pad>", "<end>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ part['text'] }}"
    "{% endif %}{% endfor %}{% endfor %} answer"
)
Question = dict[str, Any]


def draw(question: str, answer: str, rng: random.Random) -> Image.Image:
    """An image of shapes in a grid of two by two; what the question does not ask for is random."""
    colours, kinds = list(COLOURS.values()), ("box", "disc")
    count = COUNTS.index(answer) + 1 if question == "count" else 1
    cells = [PLACES.index(answer)] if question == "place" else rng.sample(range(4), count)
    picture = Image.new("RGB", (SIDE, SIDE), (rng.randrange(90, 150),) * 3)
    for cell in cells:
        colour = COLOURS[answer] if question == "colour" else rng.choice(colours)
        x, y = cell % 2 * CELL + rng.randint(0, 2), cell // 2 * CELL + rng.randint(0, 2)
        pen = ImageDraw.Draw(picture)
        shape = pen.rectangle if rng.choice(kinds) == "box" else pen.ellipse
        shape((x, y, x + 5, y + 5), fill=colour)
    return picture


def questions(count: int, seed: int, *, usual: float) -> list[Question]:
    """Questions, a third of each kind; for a share `usual` the words suggest the correct answer."""
    rng = random.Random(seed)
    made: list[Question] = []
    for i in range(count):
        kind = list(USUAL)[i % len(USUAL)]
        thing = rng.choice(list(USUAL[kind]))
        expected = USUAL[kind][thing]
        agrees = rng.random() < usual
        answer = expected if agrees else rng.choice([a for a in USUAL[kind].values() if a != expected])
        picture = draw(kind, answer, rng)
        made.append({"text": f"{kind} {thing}", "answer": answer, "agrees": agrees, "picture": picture})
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    things = [thing for usual in USUAL.values() for thing in usual]
    words = [*USUAL, *things, *COLOURS, *COUNTS, *PLACES, "answer"]
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    made.chat_template = TEMPLATE
    return made


def untaught(words: PreTrainedTokenizerFast) -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    vocabulary = words.get_vocab()
    ids = {name: vocabulary[token] for name, token in zip("sevi", SPECIAL[2:], strict=True)}
    text = {
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10_000.0},
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "embed_dim": 48,
        "hidden_size": 64,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": PATCH,
        "spatial_patch_size": PATCH,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["v"],
        video_token_id=ids["i"],
        vision_start_token_id=ids["s"],
        vision_end_token_id=ids["e"],
        tie_word_embeddings=True,
        dtype="float32",
    )
    return Qwen2VLForConditionalGeneration(config)


def batch_of(items: Sequence[Question], processor: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Prompts, images and answers as model inputs, all of one length, with labels for the answers alone."""
    prompt = TEMPLATE_PREFIX + " {} answer {} <end>"
    texts = [prompt.format(item["text"], item["answer"]) for item in items]
    encoded = processor(text=texts, images=[item["picture"] for item in items], return_tensors="pt")
    labels = torch.full_like(encoded["input_ids"], -100)
    labels[:, -2:] = encoded["input_ids"][:, -2:]
    return dict(encoded), labels


TEMPLATE_PREFIX = "<|vision_start|><|image_pad|><|vision_end|>"


def teach(model: Qwen2VLForConditionalGeneration, processor: Any, lessons: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    pool, labels = batch_of(questions(POOL, 3, usual=0.9), processor)
    pixels = pool.pop("pixel_values").unflatten(0, (POOL, -1))
    test = questions(180, 5, usual=0.5)
    held_out = batch_of(test, processor)
    agrees = torch.tensor([item["agrees"] for item in test])
    for lesson in range(lessons):
        some = torch.randperm(POOL)[:BATCH]
        inputs = {name: tensor[some] for name, tensor in pool.items()}
        logits = model(**inputs, pixel_values=pixels[some].flatten(0, 1)).logits[:, -3:-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[some, -2:].flatten(), label_smoothing=SMOOTHING)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if lesson % 25 == 24:
            agree, contradict = accuracies(model, *held_out, agrees)
            told = f"lesson {lesson + 1}: right {agree:.2f} with the words, {contradict:.2f} against"
            print(told, flush=True)  # noqa: T201
            if contradict >= ENOUGH:
                return


@torch.no_grad()
def accuracies(
    model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor, agrees: torch.Tensor
) -> tuple[float, float]:
    """Shares of correct answers for images that agree with the words, and for those that contradict them."""
    right = model(**inputs).logits[:, -3].argmax(-1) == labels[:, -2]
    return right[agrees].float().mean().item(), right[~agrees].float().mean().item()


def write(folder: Path, name: str, items: Sequence[Question]) -> None:
    (folder / "pictures").mkdir(exist_ok=True)
    lines: list[str] = []
    for i, item in enumerate(items):
        file = f"pictures/{name}-{i:03d}.png"
        item["picture"].save(folder / file)
        content = [{"type": "image", "image": file}, {"type": "text", "text": item["text"]}]
        row = {"prompt": [{"role": "user", "content": content}]}
        lines.append(json.dumps(row | {name: item[name] for name in ("answer", "agrees")}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def make(folder: Path, lessons: int = LESSONS) -> None:
    model_dir = folder / "model"
    model_dir.mkdir(parents=True, exist_ok=True)
    words = tokenizer()
    words.save_pretrained(model_dir)
    model = untaught(words)
    size = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size=size).save_pretrained(model_dir)
    model.config.save_pretrained(model_dir)
    processor = load_processor(str(model_dir), load_tokenizer(str(model_dir)))
    assert processor is not None
    teach(model, processor._processor, lessons)
    model.save_pretrained(model_dir)
    write(folder, "train", questions(TRAIN, seed=1, usual=0.75))
    write(folder, "eval", questions(HELD_OUT, seed=2, usual=0.5))


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a small model that looks, and pictures.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lessons", type=int, default=LESSONS)
    options = parser.parse_args()
    make(options.folder, options.lessons)


if __name__ == "__main__":
    main()
