"""The speed of several ranks on this machine against one, and the bytes that they send each other.

A random Llama of 5 million weights takes the same steps on 1, 2 and 4 ranks, replicated and in shards. For
each step, elapsed seconds and the processor seconds of all ranks are kept: where the machine has fewer cores
than ranks, or is busy, only processor seconds show what the distribution itself costs. Bytes are those that
a ring would send, from the sizes of the tensors really handed to torch.distributed:

    all_reduce      2 (n-1)/n of the tensor        reduce_scatter  (n-1)/n of the input
    all_gather      (n-1)/n of the output          objects         (n-1) times the pickle

Run: `python -m benchmarks.scaling --out FILE`.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.characters import tokenizer
from benchmarks.runs import ROOT, machine
from benchmarks.small_adder import CHARACTERS, problems

STEPS, SKIPPED = 7, 2
LAYOUTS = [("replicated", 1), ("replicated", 2), ("replicated", 4), ("sharded", 2), ("sharded", 4)]
PHASES = ("step", "rollout", "learn", "sync")


def make_inputs(folder: Path) -> dict[str, Any]:
    """A model, prompts, and the settings of a run on them."""
    torch.manual_seed(0)
    words = tokenizer(CHARACTERS)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(
        vocab_size=len(words), max_position_embeddings=128, pad_token_id=0, eos_token_id=1, **sizes, **heads
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    lines = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a, b in problems(160, seed=0)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "steps": STEPS,
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 16},
        "reward": {"functions": [{"path": "rlhf.rewards.builtin:numeric_match", "workers": 1}]},
        # an entropy bonus in the loss: so that a random model has a gradient in every group
        "algorithm": {"name": "grpo", "entropy_coef": 0.001, "kl": {"coef": 0.0}},
        "rollout": {"prompts_per_step": 16, "group_size": 8, "max_completion_tokens": 24},
        "learner": {"microbatch_tokens": 2048},
        "checkpoint": {"every": 0, "export": False},
        "monitor": {"sinks": [], "samples_per_step": 0},
    }


class Sent:
    """Bytes that this rank would send in a ring, by the kind of call."""

    def __init__(self) -> None:
        self.bytes: dict[str, float] = {}

    def count(self, name: str, size: Callable[..., float]) -> None:
        """Wraps a function of torch.distributed; `size` of its arguments and the number of ranks."""
        original = getattr(dist, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            ranks = dist.get_world_size(named.get("group"))
            self.bytes[name] = self.bytes.get(name, 0.0) + size(ranks, *arguments, **named)
            return original(*arguments, **named)

        setattr(dist, name, counted)

    def count_all(self) -> None:
        self.count("all_reduce", lambda n, tensor, *_, **__: 2 * (n - 1) / n * tensor.nbytes)
        self.count("all_gather_object", lambda n, _, value, **__: (n - 1) * len(pickle.dumps(value)))
        # the collectives that FSDP2 calls
        self.count("all_gather_single", lambda n, *a, **k: (n - 1) / n * _output(a, k))
        self.count("reduce_scatter_single", lambda n, *a, **k: (n - 1) * _output(a, k))


def _output(arguments: tuple[Any, ...], named: dict[str, Any]) -> float:
    """Bytes of the tensor that a collective writes: its first argument, or a keyword argument."""
    tensors = [*arguments, *(t for name, t in named.items() if name.startswith("output"))]
    return float(tensors[0].nbytes)


def one_rank(config: str, out: str) -> None:
    """The process that torchrun starts: a run whose collectives and processor seconds are counted."""
    from rlhf.cli import main
    from rlhf.trainer import Trainer

    torch.set_num_threads(1)
    sent, steps, take = Sent(), [], Trainer.step
    sent.count_all()

    def step(self: Trainer) -> Any:
        before, begin, sent.bytes = time.process_time(), time.perf_counter(), {}
        result = take(self)
        steps.append(
            {
                "cpu": time.process_time() - before,
                "clock": time.perf_counter() - begin,
                "sent": dict(sent.bytes),
            }
        )
        return result

    Trainer.step = step
    code = main(["train", config])
    Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps(steps))
    sys.exit(code)


def measure(folder: Path, settings: dict[str, Any], mode: str, ranks: int) -> dict[str, Any]:
    run = folder / f"{mode}-{ranks}"
    run.mkdir()
    settings = settings | {"run_dir": str(run / "run"), "distributed": {"mode": mode}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    subprocess.run(
        [
            sys.executable,
            *command,
            "benchmarks.scaling",
            "--rank",
            str(run / "config.yaml"),
            str(run / "counted"),
        ],
        check=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    counted = [json.loads(Path(f"{run}/counted.{rank}").read_text())[SKIPPED:] for rank in range(ranks)]
    lines = (run / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines][SKIPPED:]
    cpu = [sum(own[i]["cpu"] for own in counted) for i in range(len(records))]
    kinds = counted[0][-1]["sent"]
    return {
        "mode": mode,
        "ranks": ranks,
        "seconds": {phase: statistics.median(r[f"time/{phase}"] for r in records) for phase in PHASES},
        "processor_seconds": statistics.median(cpu),
        "sent_mb_a_rank": {name: size / 1e6 for name, size in kinds.items()},
        "tokens": statistics.median(r["rollout/tokens"] for r in records),
        "memory_peak_gib": max(r["memory/peak_gib"] for r in records),
    }


def summary(results: list[dict[str, Any]], cores: int) -> list[dict[str, Any]]:
    """Compared with one rank: speed-up in elapsed time, share of processor time that is not overhead."""
    one = results[0]
    for result in results:
        seconds, ranks = result["seconds"]["step"], result["ranks"]
        result["speedup"] = one["seconds"]["step"] / seconds
        result["efficiency"] = result["speedup"] / min(ranks, cores)
        result["work_efficiency"] = one["processor_seconds"] / result["processor_seconds"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="The same steps on 1, 2 and 4 ranks.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", nargs=2, metavar=("CONFIG", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        one_rank(*options.rank)
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        settings = make_inputs(Path(name))
        results = summary([measure(Path(name), settings, mode, n) for mode, n in LAYOUTS], cores)
    answer = {
        "question": "the same steps on 1, 2 and 4 ranks of a CPU, one thread each",
        "machine": machine(),
        "load_before": round(load, 2),
        "weights_million": 5,
        "steps_measured": STEPS - SKIPPED,
        "results": results,
    }
    text = json.dumps(answer, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    for r in results:
        sent = sum(r["sent_mb_a_rank"].values())
        print(  # noqa: T201
            f"{r['mode']:>10} x{r['ranks']}: {r['seconds']['step']:.2f} s a step (learning "
            f"{r['seconds']['learn']:.2f}), efficiency {r['efficiency']:.2f} of {min(r['ranks'], cores)} "
            f"core(s), of the work {r['work_efficiency']:.2f}, {sent:.1f} MB sent a rank"
        )


if __name__ == "__main__":
    main()
