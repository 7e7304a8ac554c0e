"""A whole GRPO step of this project and of TRL 1.16's GRPOTrainer: seconds, tokens, peak memory.

8 prompts (or `--prompts`) x 8 samples, a KL of 0.04 against a reference, one update, SmolLM2-135M in
bfloat16, a reward that both compute in well under a millisecond. The model folder is copied with another
end-of-sequence token, which the model never samples: every completion is cut at the limit, so both sides
sample and learn from the same number of tokens. Their counts are compared before anything is reported.
Each side is a process of its own; steps alternate, one side waiting while the other one works. Peak memory
is that of the allocator on a GPU, else the largest resident size of the process. Without `--trl-python`
this project runs alone. With `--ceilings` (of benchmarks/ceilings.py) the learner's share of bfloat16
matrix products is given: 6 FLOP a weight and learned token and 2 for the reference, attention left out.

    tandem   rlhf.trainer.Trainer, native engine; float32 master weights, so it holds more of them
    trl      GRPOTrainer at its fastest here: bfloat16 weights and optimizer, no gradient checkpointing, one
             microbatch where memory allows (`--microbatch`); its rollouts by `generate`. By default it
             returns freed memory to the system at each step; with `--trl-keeps-memory` it does not

An interrupted benchmark continues where it stopped (delete the case in the file to repeat it). A case is
prompt tokens : new tokens.

Run: `python -m benchmarks.grpo_step --model FOLDER --trl-python ENV/bin/python --case 46:32 --out F.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.runs import machine
from rlhf.compute_dtype import resolve_dtype
from rlhf.config.load import make_config
from rlhf.devices import this_device
from rlhf.metrics import Metrics
from rlhf.trainer import Trainer

ROOT = Path(__file__).parents[1]
GROUP, KL_COEF, LR = 8, 0.04, 1e-6
FILLER = "Here is some context. "
UNUSED_TOKEN = 5
"""A token of SmolLM2's vocabulary: a marker of its pretraining data that no chat contains."""
KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**12)}
"""Environment variables that make glibc keep freed memory in the process, as rlhf/devices.py does."""
Record = dict[str, float]


def distinct_characters(completions: list[Any], **_: Any) -> list[float]:
    return [len(set(c if isinstance(c, str) else c[0]["content"])) / 50 for c in completions]


class Paced(Trainer):
    """Takes a step for each line "step" on standard input and prints its figures."""

    def step(self) -> Metrics:
        if sys.stdin.readline().strip() != "step":
            sys.exit()
        marks: list[tuple[str, float]] = []
        phase = self.monitor.phase

        def marked(name: str) -> Any:
            marks.append((name, time.perf_counter()))
            return phase(name)

        self.monitor.phase = marked
        start = time.perf_counter()
        metrics = super().step()
        end = time.perf_counter()
        self.monitor.phase = phase
        record = {
            "step_s": end - start,
            "completion_tokens": metrics["rollout/tokens"].value,
            "prompt_tokens": GROUP * sum(len(p.token_ids) for p in self.inputs.train.prompts),
            "peak_gib": self.world.peak_memory_gib(),
            "weights": float(sum(p.numel() for p in self.components.policy.model.parameters())),
        }
        for (name, begun), (_, ended) in zip(marks, [*marks[1:], ("", end)], strict=True):
            record[f"{name}_s"] = record.get(f"{name}_s", 0.0) + ended - begun
        print("STEP " + json.dumps(record), flush=True)  # noqa: T201
        return metrics


def run_tandem(settings: dict[str, Any]) -> None:
    folder = Path(settings["folder"])
    config = {
        "run_dir": str(folder / "tandem"),
        "steps": settings["steps"],
        "model": {"path": settings["model"], "dtype": settings["dtype"]},
        "data": {"train": str(folder / "prompts.jsonl"), "max_prompt_tokens": settings["prompt_tokens"]},
        "reward": {"functions": [{"path": f"{__file__}:distinct_characters"}]},
        "algorithm": {"name": "grpo", "kl": {"coef": KL_COEF}},
        "rollout": {
            "prompts_per_step": settings["prompts"],
            "group_size": GROUP,
            "max_completion_tokens": settings["max_tokens"],
        },
        "learner": {"lr": LR, "microbatch_tokens": settings["microbatch_tokens"]},
        "checkpoint": {"every": 0, "export": False},
        "monitor": {"sinks": []},
    }
    Paced(make_config(config)).run()


class Side:
    """A process that takes one step when asked to."""

    def __init__(self, command: list[str], settings: dict[str, Any], log: Path, **environment: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | environment
        self.log = log.open("a")
        self.process = subprocess.Popen(
            [*command, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def step(self) -> Record:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("STEP "):
                return json.loads(line[5:])
        raise SystemExit(f"a side ended; what it said is in {self.log.name}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def work(folder: Path, model: Path, prompt_tokens: int, prompts: int) -> Path:
    """Writes prompts of about `tokens` tokens, and a model that never ends; returns its folder."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    per_filler = len(tokenizer(FILLER).input_ids)
    with (folder / "prompts.jsonl").open("w") as file:
        for a in range(11, 11 + prompts):
            filler = FILLER * max(0, round((prompt_tokens - 46) / per_filler))
            question = f"{filler}What is {a} + {a + 8}? Answer with the number only."
            file.write(json.dumps({"prompt": [{"role": "user", "content": question}]}) + "\n")
    endless = folder / "model"
    shutil.copytree(model, endless)
    unused = tokenizer.convert_ids_to_tokens(UNUSED_TOKEN)
    for name, key, value in (
        ("config.json", "eos_token_id", UNUSED_TOKEN),
        ("generation_config.json", "eos_token_id", UNUSED_TOKEN),
        ("tokenizer_config.json", "eos_token", unused),
    ):
        file = endless / name
        if file.is_file():
            file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    return endless


def measure(case: str, options: argparse.Namespace, taken: dict[str, list[Record]]) -> None:
    """Adds measured steps to `taken` until there are enough, alternating sides, and saves after each step."""
    prompt_tokens, max_tokens = map(int, case.split(":"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = work(folder, options.model, prompt_tokens, options.prompts)
        settings = {
            "folder": name,
            "model": str(model),
            "prompts": options.prompts,
            "group_size": GROUP,
            "prompt_tokens": prompt_tokens,
            "max_tokens": max_tokens,
            "steps": 1000,
            "dtype": options.dtype,
            "kl_coef": KL_COEF,
            "lr": LR,
            "microbatch": options.microbatch,
            "microbatch_tokens": options.microbatch_tokens,
        }
        log = Path(tempfile.gettempdir()) / "grpo_step.log"
        own = [sys.executable, "-m", "benchmarks.grpo_step", "--side"]
        sides = {"tandem": Side(own, settings, log)}
        if "trl" in taken:
            script = str(ROOT / "benchmarks" / "grpo_step_trl.py")
            allocator = KEEPS_MEMORY if options.trl_keeps_memory else {}
            sides["trl"] = Side([options.trl_python, script], settings, log, **allocator)
        try:
            for _ in range(options.warmup):
                check({who: side.step() for who, side in sides.items()})
            while min(len(records) for records in taken.values()) < options.steps:
                new = {who: side.step() for who, side in sides.items()}
                check(new)
                for who, record in new.items():
                    taken[who].append(record)
                print(case, {who: round(r["step_s"], 2) for who, r in new.items()}, flush=True)  # noqa: T201
                options.save()
        finally:
            for side in sides.values():
                side.close()


def check(records: dict[str, Record]) -> None:
    for key in ("prompt_tokens", "completion_tokens"):
        counts = {who: int(record[key]) for who, record in records.items()}
        if len(set(counts.values())) != 1:
            raise SystemExit(f"the sides did not do the same work: {key} {counts}")


def summary(case: str, taken: dict[str, list[Record]], ceiling: float | None) -> dict[str, Any]:
    def median(who: str, key: str) -> float:
        return round(statistics.median(r[key] for r in taken[who] if key in r), 3)

    rows = {
        who: {
            "step_s": median(who, "step_s"),
            "tokens_per_second": round(median(who, "completion_tokens") / median(who, "step_s"), 1),
            "peak_gib": round(max(r["peak_gib"] for r in records), 2),
            "split_s": {key: median(who, f"{key}_s") for key in ("rollout", "reward", "learn", "sync")},
            "steps": len(records),
        }
        for who, records in taken.items()
    }
    found: dict[str, Any] = {"case": case, **rows}
    if "trl" in rows:
        found["times_faster"] = round(rows["trl"]["step_s"] / rows["tandem"]["step_s"], 2)
        found["share_of_peak"] = round(rows["tandem"]["peak_gib"] / rows["trl"]["peak_gib"], 2)
    if ceiling is not None:
        # FLOP a weight and learned token, each prompt once a group: 6 of the policy, 2 of the reference
        tokens = median("tandem", "completion_tokens") + median("tandem", "prompt_tokens") / GROUP
        flop = 8 * median("tandem", "weights") * tokens
        found["learner_share_of_ceiling"] = round(flop / median("tandem", "learn_s") / 1e12 / ceiling, 3)
    return found


def main() -> None:
    if sys.argv[1] == "--side":
        run_tandem(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--trl-python", help="a Python that has TRL 1.16")
    parser.add_argument("--ceilings", type=Path, help="what benchmarks/ceilings.py wrote")
    parser.add_argument("--case", required=True)
    parser.add_argument("--prompts", type=int, default=8, help="groups a step")
    parser.add_argument("--microbatch", type=int, default=64, help="of TRL, sequences")
    parser.add_argument("--trl-keeps-memory", action="store_true", help="as tandem's process does on a CPU")
    parser.add_argument("--microbatch-tokens", type=int, default=4096, help="of tandem")
    dtype = resolve_dtype("auto", this_device())
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=dtype, help="of both sides")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cases = json.loads(options.out.read_text())["cases"] if options.out.is_file() else {}
    sides = ["tandem", "trl"] if options.trl_python else ["tandem"]
    entry = cases.setdefault(options.case, {"records": {side: [] for side in sides}})

    ceiling = None
    # the ceiling is that of bfloat16
    if options.ceilings and options.dtype == "bfloat16":
        ceiling = json.loads(options.ceilings.read_text())["matmul_bf16_tflops"]

    def save() -> None:
        entry["command"] = "python -m benchmarks.grpo_step " + " ".join(sys.argv[1:])
        entry["dtype"] = options.dtype
        entry["summary"] = summary(options.case, entry["records"], ceiling)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine(), "cases": cases}, indent=1) + "\n")

    options.save = save
    measure(options.case, options, entry["records"])
    print(json.dumps(entry["summary"], indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
