"""DPO on preference pairs beside TRL 1.16's DPOTrainer: losses, seconds a step, peak memory.

16 pairs a step (or `--pairs`) in float32, beta 0.1, AdamW with a constant learning rate, gradients clipped to
1. Both sides start from the same files, the model's in float32, and get the same pairs in the order in which
this project draws them.
Each reports the token ids it learned from, which are compared with the file's at every step. From the second
step on, losses depend on all updates before, so that equal losses mean equal updates. Prompts have exactly
the tokens asked for and completions 16 (the end-of-sequence token included), so that TRL pads nothing. Chosen
and rejected completions have different words, so that the loss falls within a few steps.

Each side is a process of its own; after the first step of each, steps alternate, one side working while the
others wait. The first step is left out of the medians. All sides of a command are in memory at once: name as
many as fit. Peak memory is that of the allocator on a GPU, else the largest resident size of the process.

    tandem SIZE     rlhf.trainer.Trainer with `data.mode: offline`; SIZE is `learner.microbatch_tokens`. The
                    prompt of a pair goes through the model once
    trl SIZE        SIZE is the pairs of a microbatch and divides those of a step

Words may follow, joined by `+`:

    precompute      (both) the log-probs of the reference are computed before training, which takes the
                    seconds `precompute_s`, and no second model is held
    checkpointing   (TRL) activations are computed again, TRL's default: less memory, more time
    keeps_memory    (TRL) freed memory stays in the process, as in tandem's; it does not go back to the system
    compact_head    (TRL) tokens of prompts do not go through the language-model head; TRL does that by
                    itself on a GPU only, so one of its functions is replaced

Run: `python -m benchmarks.preference --model FOLDER --trl-python ENV/bin/python --prompt 46 --tandem 4096
--trl 16 --out FILE.json`. Exit status 1: a loss differs by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.grpo_step import KEEPS_MEMORY, ROOT, Side
from benchmarks.runs import machine
from rlhf.config.load import make_config
from rlhf.data.order import order
from rlhf.metrics import Metrics
from rlhf.trainer import Trainer
from rlhf.types import Experience, Group

COMPLETION_TOKENS, BETA, SEED = 16, 0.1, 0
TOLERANCE = 1e-4
WORDS = {"tandem": {"precompute"}, "trl": {"precompute", "checkpointing", "keeps_memory", "compact_head"}}
Record = dict[str, Any]
Pair = tuple[list[int], list[int], list[int]]
"""Token ids of prompt, chosen and rejected completion."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One side of the comparison. Example: `Variant("trl", 4, ("precompute",))` is written `4+precompute`."""

    who: str
    size: int
    words: tuple[str, ...] = ()

    @classmethod
    def read(cls, who: str, text: str, pairs: int) -> Variant:
        """Raises SystemExit, with what was expected, for a text that names no variant."""
        size, *words = text.split("+")
        unknown = sorted(set(words) - WORDS[who])
        if not size.isdigit() or unknown or (who == "trl" and pairs % int(size)):
            raise SystemExit(
                f"--{who} {text}: expected a size"
                + (f" that divides {pairs}" if who == "trl" else "")
                + f" and words out of {', '.join(sorted(WORDS[who]))}, joined by +"
            )
        return cls(who, int(size), tuple(words))

    @property
    def name(self) -> str:
        return " ".join([self.who, "+".join([str(self.size), *self.words])])


class Paced(Trainer):
    """Takes a step for each line "step" on standard input and prints its figures."""

    prepare_s = 0.0

    def prepare(self) -> None:
        start = time.perf_counter()
        super().prepare()
        self.prepare_s = time.perf_counter() - start

    def step(self) -> Metrics:
        if sys.stdin.readline().strip() != "step":
            sys.exit()
        marks: list[tuple[str, float]] = []
        learned: list[Group] = []
        phase, samples = self.monitor.phase, self.monitor.samples

        def marked(name: str) -> Any:
            marks.append((name, time.perf_counter()))
            return phase(name)

        def seen(step: int, groups: Sequence[Group], experience: Experience | None = None) -> None:
            learned.extend(groups)
            samples(step, groups, experience)

        self.monitor.phase, self.monitor.samples = marked, seen
        start = time.perf_counter()
        metrics = super().step()
        end = time.perf_counter()
        self.monitor.phase, self.monitor.samples = phase, samples
        record: Record = {
            "step_s": end - start,
            "loss": metrics["pairs/loss"].value,
            "grad_norm": metrics["grad_norm"].value,
            "pairs": [pair_of(group) for group in learned],
            "precompute_s": self.prepare_s if self.config.data.precompute_reference else 0.0,
            "peak_gib": self.world.peak_memory_gib(),
            "threads": machine()["threads"],
        }
        for (name, begun), (_, ended) in zip(marks, [*marks[1:], ("", end)], strict=True):
            record[f"{name}_s"] = record.get(f"{name}_s", 0.0) + ended - begun
        print("STEP " + json.dumps(record), flush=True)  # noqa: T201
        return metrics


def pair_of(group: Group) -> Pair:
    rejected, chosen = sorted(group.trajectories, key=lambda t: t.reward or 0.0)
    return list(group.prompt.token_ids), list(chosen.token_ids), list(rejected.token_ids)


def run_tandem(settings: dict[str, Any]) -> None:
    folder = Path(settings["folder"])
    config = {
        "run_dir": str(folder / settings["name"]),
        "seed": SEED,
        "steps": settings["steps"],
        "model": {"path": settings["model"], "dtype": "float32"},
        "data": {
            "mode": "offline",
            "train": str(folder / "pairs.jsonl"),
            "max_prompt_tokens": settings["prompt_tokens"],
            "precompute_reference": "precompute" in settings["words"],
        },
        "algorithm": {"name": "dpo", "beta": BETA},
        "rollout": {"prompts_per_step": settings["pairs"], "max_completion_tokens": COMPLETION_TOKENS},
        "learner": {"lr": settings["lr"], "microbatch_tokens": settings["microbatch"]},
        "checkpoint": {"every": 0, "export": False},
        "monitor": {"sinks": []},
    }
    Paced(make_config(config)).run()


def make_pairs(tokenizer: Any, prompt_tokens: int, count: int) -> tuple[list[dict[str, str]], list[Pair]]:
    """`count` lines of text, and the token ids that they must become.

    Texts are made of lower-case words that are one token with the space before them, so that a text has the
    same tokens alone and behind its prompt.
    """
    words = [
        text
        for text in (tokenizer.decode([token]) for token in range(len(tokenizer)))
        if re.fullmatch(" [a-z]{3,}", text) and len(tokenizer(text).input_ids) == 1
    ]
    some = min(100, len(words) // 3)
    chosen, rejected, others = words[:some], words[some : 2 * some], words[2 * some :]
    draw = random.Random(SEED)
    lines: list[dict[str, str]] = []
    pairs: list[Pair] = []
    for _ in range(count):
        prompt = "".join(draw.choices(others, k=prompt_tokens))
        line = {
            "prompt": prompt,
            "chosen": "".join(draw.choices(chosen, k=COMPLETION_TOKENS - 1)),
            "rejected": "".join(draw.choices(rejected, k=COMPLETION_TOKENS - 1)),
        }
        ids = tokenizer(prompt).input_ids
        joined = [
            tokenizer(prompt + line[side] + tokenizer.eos_token).input_ids for side in ("chosen", "rejected")
        ]
        lengths = {len(ids) + COMPLETION_TOKENS, *map(len, joined)}
        assert lengths == {prompt_tokens + COMPLETION_TOKENS}, (line, lengths)
        lines.append(line)
        pairs.append((ids, joined[0][prompt_tokens:], joined[1][prompt_tokens:]))
    return lines, pairs


def check(name: str, record: Record, expected: list[Pair], threads: int) -> Record:
    """The record without its token ids. Raises SystemExit unless it learned from the expected pairs."""
    found = sorted(tuple(pair) for pair in record["pairs"])
    if found != sorted(expected):
        raise SystemExit(
            f"{name} did not learn from the pairs of this step: expected {len(expected)} pairs, of which the "
            f"first is {min(expected)}, got {len(found)}, of which the first is {found[0] if found else None}"
        )
    if record["threads"] != threads:
        raise SystemExit(f"{name} computes with {record['threads']} threads, the other sides with {threads}")
    return {key: value for key, value in record.items() if key not in ("pairs", "threads")}


def measure(
    variants: list[Variant], options: argparse.Namespace, taken: dict[str, list[Record]], threads: int
) -> None:
    """Takes all steps, alternating sides, and adds their figures to `taken`, by the names of the variants."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        lines, pairs = make_pairs(tokenizer, options.prompt, options.pairs * options.steps)
        places = order(SEED, len(lines), 0, len(lines))
        write(folder / "pairs.jsonl", lines)
        write(folder / "in_order.jsonl", [lines[place] for place in places])
        settings = {
            "folder": name,
            "model": str(in_float32(options.model, folder / "model")),
            "prompt_tokens": options.prompt,
            "pairs": options.pairs,
            "steps": options.steps,
            "beta": BETA,
            "lr": options.lr,
        }
        sides: dict[str, Side] = {}
        try:
            for step in range(options.steps):
                here = places[options.pairs * step : options.pairs * (step + 1)]
                expected = [pairs[place] for place in here]
                for variant in variants:
                    if step == 0:
                        # one after the other, so that no side loads its weights while another one works
                        sides[variant.name] = start(variant, settings, options.trl_python)
                    record = sides[variant.name].step()
                    taken[variant.name].append(check(variant.name, record, expected, threads))
                    figures = (
                        f"{record['step_s']:.2f} s, loss {record['loss']:.6f}, {record['peak_gib']:.2f} GiB"
                    )
                    print(f"step {step + 1} {variant.name}: {figures}", flush=True)  # noqa: T201
        finally:
            for side in sides.values():
                side.close()


def in_float32(model: Path, folder: Path) -> Path:
    """A copy of a model whose files are float32, so that frozen weights can be mapped from them."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    AutoModelForCausalLM.from_pretrained(model, dtype="float32").save_pretrained(folder)
    return folder


def start(variant: Variant, settings: dict[str, Any], trl_python: str | None) -> Side:
    settings = settings | {"name": variant.name, "microbatch": variant.size, "words": variant.words}
    log = Path(tempfile.gettempdir()) / "preference.log"
    if variant.who == "tandem":
        return Side([sys.executable, "-m", "benchmarks.preference", "--side"], settings, log)
    if trl_python is None:
        raise SystemExit("--trl needs --trl-python: a Python that has TRL 1.16")
    script = str(ROOT / "benchmarks" / "preference_trl.py")
    allocator = KEEPS_MEMORY if "keeps_memory" in variant.words else {}
    return Side([trl_python, script], settings, log, **allocator)


def write(path: Path, lines: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def summary(taken: dict[str, list[Record]]) -> dict[str, Any]:
    """Each side's medians over all steps but the first, and each side of tandem compared with each of TRL.

    Example: steps of 8 s against 12 s are `times_faster` 1.5, peaks of 3 against 6 GiB `share_of_peak` 0.5.
    """
    sides = {name: of_side(records) for name, records in taken.items()}
    compared: list[dict[str, Any]] = []
    for ours, theirs in product(
        *([name for name in taken if name.startswith(who)] for who in ("tandem", "trl"))
    ):
        losses = zip(sides[ours]["losses"], sides[theirs]["losses"], strict=True)
        entry: dict[str, Any] = {
            "tandem": ours,
            "trl": theirs,
            "times_faster": round(sides[theirs]["step_s"] / sides[ours]["step_s"], 2),
            "share_of_peak": round(sides[ours]["peak_gib"] / sides[theirs]["peak_gib"], 2),
            "largest_loss_difference": max(abs(a - b) for a, b in losses),
        }
        if any("precompute_s" in sides[name] for name in (ours, theirs)):
            # every pair is drawn once in a run, so a step's share of the pass is that of its pairs
            whole = [
                sides[name]["step_s"] + sides[name].get("precompute_s", 0.0) / len(taken[name])
                for name in (ours, theirs)
            ]
            entry["times_faster_with_precomputing"] = round(whole[1] / whole[0], 2)
        compared.append(entry)
    return {"sides": sides, "compared": compared}


def of_side(records: list[Record]) -> dict[str, Any]:
    def median(key: str) -> float:
        return round(statistics.median(r[key] for r in records[1:]), 3)

    seconds = [r["step_s"] for r in records[1:]]
    side: dict[str, Any] = {
        "step_s": median("step_s"),
        "step_s_range": [round(min(seconds), 3), round(max(seconds), 3)],
        "learn_s": median("learn_s"),
        "sync_s": median("sync_s"),
        "peak_gib": round(max(r["peak_gib"] for r in records), 2),
        "losses": [r["loss"] for r in records],
        "grad_norms": [r["grad_norm"] for r in records],
    }
    if records[0].get("precompute_s"):
        side["precompute_s"] = round(records[0]["precompute_s"], 3)
    return side


def main() -> int:
    if sys.argv[1:2] == ["--side"]:
        run_tandem(json.loads(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--trl-python", help="a Python that has TRL 1.16")
    parser.add_argument("--prompt", type=int, required=True, help="tokens of a prompt")
    parser.add_argument("--tandem", nargs="*", default=[], metavar="SIZE", help="variants of this project")
    parser.add_argument("--trl", nargs="*", default=[], metavar="SIZE", help="variants of TRL")
    parser.add_argument("--pairs", type=int, default=16, help="in a step")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: expected at least 2, because the first one is left out of the medians")
    variants = [
        Variant.read(who, text, options.pairs) for who in ("tandem", "trl") for text in getattr(options, who)
    ]
    taken: dict[str, list[Record]] = {variant.name: [] for variant in variants}
    here = machine()
    measure(variants, options, taken, here["threads"])
    case = summary(taken)
    cases = json.loads(options.out.read_text())["cases"] if options.out.is_file() else {}
    cases[f"prompt {options.prompt}: {', '.join(taken)}"] = {
        "command": "python -m benchmarks.preference " + " ".join(sys.argv[1:]),
        "pairs": options.pairs,
        "lr": options.lr,
        **case,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": here, "cases": cases}, indent=1) + "\n")
    print(json.dumps(case, indent=1))  # noqa: T201
    apart = [c for c in case["compared"] if c["largest_loss_difference"] > TOLERANCE]
    for entry in apart:
        print(f"the losses of {entry['tandem']} and {entry['trl']} differ by more than {TOLERANCE}")  # noqa: T201
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
