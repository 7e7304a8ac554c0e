"""Seconds and peak memory of one update: prompts packed once a group, and a head that stores no logits.

    padded, logits   one padded row for each sequence; `lm_head(hidden).float()` of completion rows, autograd
    padded           the same rows, `token_stats`
    packed           the same sequences end to end without padding, `token_stats`
    shared, logits   the prompt once a group; `lm_head(hidden).float()`, autograd
    shared           the prompt once a group, `token_stats`: what the learner does

Groups of 8 completions of 64 tokens (`--size`, `--length`), bfloat16 with a float32 master, GRPO without a
reference, forward, backward and optimizer step. All contenders make the same update: before anything is
reported their entropies and gradient norms are compared (within 2 %, the rounding of bfloat16). Each repeat
runs every contender once in turn; peak memory is that of two updates in a process of its own, less what the
model and its optimizer hold: of the allocator on a GPU, else the largest resident size. On a CPU
freed memory is kept, as in a run.

Run: `python -m benchmarks.learner --model MODEL_FOLDER --out benchmarks/results/MACHINE/learner.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.runs import machine
from rlhf.algos.algorithm import KL
from rlhf.algos.table import ALGORITHMS
from rlhf.config.learner import LearnerConfig
from rlhf.config.model import ModelConfig
from rlhf.devices import keep_freed_memory
from rlhf.distributed.world import World
from rlhf.kernels.token_stats import TokenStats
from rlhf.learn.experience import ExperienceBuilder
from rlhf.learn.learner import Learner
from rlhf.learn.models import Models
from rlhf.learn.optimizer import MasterAdamW
from rlhf.metrics import Metrics
from rlhf.models.loading import load_policy
from rlhf.models.packing import Layout, Packed
from rlhf.models.policy import Policy
from rlhf.types import Experience, FinishReason, Group, Prompt, Trajectory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTENDERS = ("padded, logits", "padded", "packed", "shared, logits", "shared")
LAYOUT: dict[str, Layout] = {"padded": "padded", "packed": "packed", "shared": "shared_prefix"}


class WithLogits(Policy):
    """The plain way: all logits of the completion rows at once, products in the dtype of the weights."""

    def statistics(
        self,
        packed: Packed,
        *,
        temperature: float,
        want: tuple[str, ...],
        reference: Policy | None = None,
        hidden: Tensor | None = None,
    ) -> TokenStats:
        assert reference is None
        hidden = self.hidden(packed) if hidden is None else hidden
        logits = self.head.module(hidden).float() / temperature
        logprobs = logits.log_softmax(-1)
        logprob = logprobs.gather(-1, packed.targets[:, None])[:, 0]
        entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
        return TokenStats(logprob=logprob, entropy=entropy)


class Contender:
    """A way to compute updates. All share one model and one optimizer, to save memory."""

    def __init__(self, name: str, learner: Learner, experience: Experience) -> None:
        self.layout: Layout = LAYOUT[name.split(",")[0]]
        policy = learner.policy
        if name.endswith("logits"):
            # a Policy assumes that the attention it finds is the model's own
            policy.layout = "padded"
            policy = WithLogits(policy.model, layout=self.layout)
        self.policy, self.learner, self.experience = policy, learner, experience

    def update(self) -> Metrics:
        self.policy.layout = self.layout
        self.learner.policy = self.policy
        return self.learner.update(self.experience, step=0, seed=0, kl_coef=0.0)


@dataclass(frozen=True, slots=True)
class Work:
    """The experience of one update."""

    model: str
    prompt: int
    groups: int
    size: int
    length: int
    microbatch_tokens: int


def contenders(names: Sequence[str], work: Work) -> dict[str, Contender]:
    world = World(0, 1, DEVICE)
    policy = load_policy(ModelConfig(path=work.model), work.model, world.device)
    # a learning rate so small that the weights hardly change
    section = LearnerConfig(lr=1e-12, microbatch_tokens=work.microbatch_tokens)
    optimizer = MasterAdamW(policy.model, torch.bfloat16, section, 100)
    algorithm = ALGORITHMS["grpo"](kl=KL())
    models = Models(algorithm=algorithm, policy=policy)
    builder = ExperienceBuilder(models, world, section, temperature=1.0)
    learner = Learner(models, optimizer, world, section, temperature=1.0)
    experience = builder.build(groups(work, policy.head.module.weight.shape[0]), kl_coef=0.0)
    return {name: Contender(name, learner, experience) for name in names}


def groups(work: Work, vocabulary: int) -> list[Group]:
    rng = random.Random(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocabulary) for _ in range(n))

    def sample(reward: float) -> Trajectory:
        ids = tokens(work.length)
        n = len(ids)
        return Trajectory(ids, (True,) * n, (0,) * n, (-10.0,) * n, FinishReason.STOP, (), "", reward)

    return [
        Group(Prompt(f"{i}", tokens(work.prompt), ""), tuple(sample(float(k % 2)) for k in range(work.size)))
        for i in range(work.groups)
    ]


def check(first: dict[str, Metrics]) -> None:
    """Stops the benchmark unless all contenders make the same update."""
    for name in ("grad_norm", "entropy"):
        values = {who: metrics[name].value for who, metrics in first.items()}
        spread = max(values.values()) / min(values.values()) - 1
        if spread > 0.02:
            raise SystemExit(f"contenders differ in {name}: {values}")


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(names: Sequence[str], work: Work, repeats: int) -> dict[str, list[float]]:
    ways = contenders(names, work)
    check({name: way.update() for name, way in ways.items()})
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else reversed(names):
            wait()
            start = time.perf_counter()
            ways[name].update()
            wait()
            times[name].append(time.perf_counter() - start)
    return times


def peak_gib(name: str, work: Work) -> float:
    """The memory that updates add to the loaded model and its optimizer, measured in a new process."""
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in asdict(work).items()]
    command = [sys.executable, "-m", "benchmarks.learner", "--memory-of", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the memory of {name} could not be measured:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def measure_memory(name: str, work: Work) -> float:
    contender = contenders([name], work)[name]
    # the optimizer's moments are allocated first, so that they do not count as part of an update
    contender.learner.optimizer.step(0, contender.learner.world)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        for _ in range(2):
            contender.update()
        return (torch.cuda.max_memory_allocated() - held) / 2**30

    def kib(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    # from here on the largest resident size counts, so that loading does not count
    Path("/proc/self/clear_refs").write_text("5")
    resident = kib("VmRSS:")
    for _ in range(2):
        contender.update()
    return (kib("VmHWM:") - resident) / 2**20


def measure(names: Sequence[str], work: Work, repeats: int) -> list[dict[str, Any]]:
    times = seconds(names, work, repeats)
    medians = {name: statistics.median(t) for name, t in times.items()}
    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {
            "prompt_tokens": work.prompt,
            "contender": name,
            "median_s": round(medians[name], 4),
            "times_as_fast_as": {other: round(medians[other] / medians[name], 2) for other in names},
            "peak_gib_of_updates": round(peak_gib(name, work), 2),
        }
        print(row, flush=True)  # noqa: T201
        rows.append({**row, "all_s": [round(t, 4) for t in times[name]]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prompt", type=int, nargs="+", default=[46, 128, 256, 512])
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--microbatch-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--memory-of", choices=CONTENDERS)
    options = parser.parse_args()
    work = Work(
        options.model,
        options.prompt[0],
        options.groups,
        options.size,
        options.length,
        options.microbatch_tokens,
    )
    if DEVICE.type == "cpu":
        keep_freed_memory()
    if options.memory_of:
        print(measure_memory(options.memory_of, work))  # noqa: T201
        return
    rows: list[dict[str, Any]] = []
    for prompt in options.prompt:
        rows += measure(options.contenders, replace(work, prompt=prompt), options.repeats)
        if options.out:
            save(
                options.out,
                {
                    "work": {**asdict(work), "prompt": options.prompt, "repeats": options.repeats},
                    "rows": rows,
                },
            )


def save(path: Path, found: dict[str, Any]) -> None:
    """Saves the results after each prompt length, so that they survive an interruption."""
    command = "python -m benchmarks.learner " + " ".join(sys.argv[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "machine": machine(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
