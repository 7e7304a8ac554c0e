"""Makes a small vision model that can look closer, and pictures half of which need it.

A large picture (32 x 32) shows a coloured square in one of its quarters, and the question is its colour.
The prompt has the picture with a quarter of its pixels. A square of one colour can be read there (a
`readable` question). One in which every other pixel has the opposite colour (a `hidden` one) is an even grey
there, which shows where the square is and not what colour it has. The turn `crop topleft` shows that quarter
of the large picture as it is, `crop all` shows the whole.

FOLDER/model is the Qwen2-VL of benchmarks/small_looker.py, taught by supervised steps on episodes that call
the tool in half of the cases, whatever the question is: for the right quarter in three of five, for a wrong
one in one of five, and for the whole picture in one of five. What cannot be seen is answered at random.
FOLDER/train.jsonl has questions for the tool of examples/crop, half of them readable.

Run: `python -m benchmarks.small_cropper FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.cropper_task import BOXES, KINDS
from benchmarks.small_looker import COLOURS, LR, PATCH, SPECIAL, untaught
from rlhf.models.pretrained import load_tokenizer
from rlhf.models.vision.processor import load_processor

SIDE, MARK = 32, 12
"""Pixels of a side of the large picture, and of the coloured square."""
ANSWERS = tuple(COLOURS)
QUARTERS = tuple(word for word in BOXES if word != "all")
TURNS = ("<user>", "<assistant>", "<tool>")
SHOWN = "the part that you asked for"
"""What the tool of examples/crop says beside the picture."""
TEMPLATE = (
    "{% for tool in tools or [] %} {{ tool['function']['name'] }}{% endfor %}"
    "{% for message in messages %} <{{ message['role'] }}>"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <|vision_start|><|image_pad|><|vision_end|>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)
IMAGE = " <|vision_start|><|image_pad|><|vision_end|>"
PROMPT = f" crop <user>{IMAGE} colour <assistant>"
LESSONS, BATCH, POOL = 800, 48, 2500
SMOOTHING = 0.05
ASKS = ((None,), ("right", "right", "right", "wrong"), ("all",))
"""What the episodes of a pool ask for: nothing, a quarter (three in four are the right one), the whole."""
Rows = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Question:
    kind: str
    answer: str
    quarter: str
    large: Image.Image
    subject: tuple[float, float, float, float]
    """Edges of the square, as shares of the picture."""

    @property
    def small(self) -> Image.Image:
        return self.large.resize((SIDE // 2, SIDE // 2), Image.Resampling.BOX)

    def shown(self, box: str) -> Image.Image:
        left, upper, right, lower = (round(SIDE * edge) for edge in BOXES[box])
        return self.large.crop((left, upper, right, lower))


def draw(rng: random.Random, number: int) -> Question:
    """A question; even numbers are readable."""
    kind, answer, quarter = KINDS[number % 2], rng.choice(ANSWERS), rng.choice(QUARTERS)
    picture = Image.new("RGB", (SIDE, SIDE), (rng.randrange(10, 60),) * 3)
    left, upper, _, _ = (int(SIDE * edge) for edge in BOXES[quarter])
    # at even places, so that a pixel of the small picture is either of the square or beside it
    left, upper = left + 2 * rng.randrange(3), upper + 2 * rng.randrange(3)
    colour = COLOURS[answer]
    opposite = (255 - colour[0], 255 - colour[1], 255 - colour[2])
    for x in range(MARK):
        for y in range(MARK):
            other = kind == "hidden" and (x + y) % 2
            picture.putpixel((left + x, upper + y), opposite if other else colour)
    subject = (left / SIDE, upper / SIDE, (left + MARK) / SIDE, (upper + MARK) / SIDE)
    return Question(kind, answer, quarter, picture, subject)


def tokenizer() -> PreTrainedTokenizerFast:
    special = [*SPECIAL, *TURNS]
    words = ["crop", "colour", *BOXES, *ANSWERS, *SHOWN.split()]
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate([*special, *words])}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    made.add_special_tokens({"additional_special_tokens": special[2:]})
    made.chat_template = TEMPLATE
    return made


def lesson_of(question: Question, box: str | None, rng: random.Random) -> tuple[str, list[Image.Image]]:
    """The text of an episode that asks for this box, or answers at once, and its pictures."""
    sees = question.kind == "readable" if box is None else box in (question.quarter, "all")
    answer = question.answer if sees else rng.choice(ANSWERS)
    if box is None:
        return f"{PROMPT} {answer}", [question.small]
    call = f" crop {box} <end> <tool>{IMAGE} {SHOWN} <assistant> {answer}"
    return PROMPT + call, [question.small, question.shown(box)]


def lessons(processor: Any, seed: int) -> list[tuple[Rows, torch.Tensor]]:
    """Inputs and labels of `POOL` episodes for each of `ASKS`, which are of one length each."""
    rng = random.Random(seed)
    pools: list[tuple[Rows, torch.Tensor]] = []
    for asks in ASKS:
        texts, pictures = list[str](), list[Image.Image]()
        for i in range(POOL):
            question, box = draw(rng, i), rng.choice(asks)
            if box == "right":
                box = question.quarter
            elif box == "wrong":
                box = rng.choice([quarter for quarter in QUARTERS if quarter != question.quarter])
            text, shown = lesson_of(question, box, rng)
            texts.append(text)
            pictures += shown
        rows = dict(processor(text=texts, images=pictures, return_tensors="pt"))
        ids = rows["input_ids"]
        words = processor.tokenizer.get_vocab()
        start = ids[0].tolist().index(words["<assistant>"]) + 1
        labels = torch.full_like(ids, -100)
        # the first turn (one word of an answer, two of a call), and the last word
        until = start + (1 if asks == (None,) else 2)
        labels[:, start:until], labels[:, -1] = ids[:, start:until], ids[:, -1]
        pools.append((rows, labels))
    return pools


def teach(model: Qwen2VLForConditionalGeneration, processor: Any, count: int) -> None:
    pools = lessons(processor, seed=3)
    pixels = [rows.pop("pixel_values").unflatten(0, (POOL, -1)) for rows, _ in pools]
    grids = [rows.pop("image_grid_thw").unflatten(0, (POOL, -1)) for rows, _ in pools]
    shares = (BATCH, BATCH * 4 // 5, BATCH // 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for lesson in range(count):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, 2.0 * (1 - lesson / count))
        losses = torch.zeros(())
        for (rows, labels), pixel, grid, size in zip(pools, pixels, grids, shares, strict=True):
            some = torch.randperm(POOL)[:size]
            inputs = {name: tensor[some] for name, tensor in rows.items()}
            seen = {"pixel_values": pixel[some].flatten(0, 1), "image_grid_thw": grid[some].flatten(0, 1)}
            logits = model(**inputs, **seen).logits[:, :-1].flatten(0, 1)
            targets = labels[some, 1:].flatten()
            losses = losses + F.cross_entropy(logits, targets, label_smoothing=SMOOTHING, reduction="sum")
        (losses / sum(shares)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if lesson % 100 == 99:
            print(f"lesson {lesson + 1}: loss {losses.item() / sum(shares):.3f}", flush=True)  # noqa: T201


def write(folder: Path, questions: Sequence[Question]) -> None:
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    lines: list[str] = []
    for i, question in enumerate(questions):
        question.small.save(pictures / f"{i:04d}-small.png")
        question.large.save(pictures / f"{i:04d}-large.png")
        image = {"type": "image", "image": f"pictures/{i:04d}-small.png"}
        row: dict[str, Any] = {
            "prompt": [{"role": "user", "content": [image, {"type": "text", "text": "colour"}]}],
            "large": str(pictures / f"{i:04d}-large.png"),
        }
        row |= {"answer": question.answer, "kind": question.kind, "subject": question.subject}
        lines.append(json.dumps(row))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def make(folder: Path, *, count: int = LESSONS, questions: int = 1200) -> None:
    model_dir = folder.absolute() / "model"
    model_dir.mkdir(parents=True, exist_ok=True)
    words = tokenizer()
    words.save_pretrained(model_dir)
    model = untaught(words)
    size = {"shortest_edge": (SIDE // 2) ** 2, "longest_edge": SIDE**2}
    Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size=size).save_pretrained(model_dir)
    model.config.save_pretrained(model_dir)
    processor = load_processor(str(model_dir), load_tokenizer(str(model_dir)))
    assert processor is not None
    teach(model, processor._processor, count)
    model.save_pretrained(model_dir)
    rng = random.Random(1)
    write(folder.absolute(), [draw(rng, i) for i in range(questions)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a small model that can look closer, and pictures.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lessons", type=int, default=LESSONS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    make(options.folder, count=options.lessons)


if __name__ == "__main__":
    main()
