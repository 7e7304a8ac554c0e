"""What do a prompt packed once a group and a head without logits give? One update: seconds and peak memory.

    padded, logits   a padded row a sequence, float32 logits of completion rows, log_softmax by autograd
    padded           the same rows, `token_stats`
    shared, logits   the prompt once a group, float32 logits, log_softmax by autograd
    shared           the prompt once a group, `token_stats`: what the learner does

Groups of 8 completions of 64 tokens, bfloat16 with a float32 master, GRPO without a reference, forward,
backward and optimizer step. All contenders make the same update: before anything is reported their losses and
gradient norms are compared (within 2 %, the rounding of bfloat16). Each repeat runs every contender once in
turn; peak memory is the largest resident size of a process of its own that makes two updates, less that
before the first.

Run: `python -m benchmarks.learner --model MODEL_FOLDER --out benchmarks/results/MACHINE/learner.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.algos.algorithm import KL
from rlhf.algos.table import ALGORITHMS
from rlhf.config import LearnerConfig, ModelConfig
from rlhf.distributed import World
from rlhf.experience import ExperienceBuilder
from rlhf.kernels.token_stats import TokenStats
from rlhf.learner import Learner
from rlhf.metrics import Metrics
from rlhf.optimizer import MasterAdamW
from rlhf.packing import Layout, Packed
from rlhf.policy import Policy
from rlhf.types import Experience, FinishReason, Group, Prompt, Trajectory

SIZE, LENGTH = 8, 64
CONTENDERS = ("padded, logits", "padded", "shared, logits", "shared")


class WithLogits(Policy):
    """The plain way: all logits of the completion rows at once, in float32."""

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
    """A way to compute updates. All share one model and one optimizer, or memory for four would be needed."""

    def __init__(self, name: str, learner: Learner, experience: Experience) -> None:
        self.layout: Layout = "shared_prefix" if name.startswith("shared") else "padded"
        policy = learner.policy
        if name.endswith("logits"):
            # a policy takes the attention it finds for the model's own
            policy.layout = "padded"
            policy = WithLogits(policy.model, layout=self.layout)
        self.policy, self.learner, self.experience = policy, learner, experience

    def update(self) -> Metrics:
        self.policy.layout = self.layout
        self.learner.policy = self.policy
        return self.learner.update(self.experience, step=0, seed=0, kl_coef=0.0)


def contenders(
    names: Sequence[str], model: str, prompt: int, microbatch_tokens: int, count: int
) -> dict[str, Contender]:
    world = World(0, 1, torch.device("cpu"))
    policy = Policy.load(ModelConfig(path=model), model, world.device)
    # so small that the weights stay where they are
    section = LearnerConfig(lr=1e-12, microbatch_tokens=microbatch_tokens)
    optimizer = MasterAdamW(policy.model, torch.bfloat16, section, 100)
    algorithm = ALGORITHMS["grpo"](kl=KL())
    builder = ExperienceBuilder(
        policy,
        None,
        algorithm,
        world,
        temperature=1.0,
        microbatch_tokens=microbatch_tokens,
        keep_old=False,
    )
    learner = Learner(policy, None, algorithm, optimizer, world, section, temperature=1.0)
    vocabulary = policy.head.module.weight.shape[0]
    experience = builder.build(groups(count, prompt, vocabulary), kl_coef=0.0)
    return {name: Contender(name, learner, experience) for name in names}


def groups(count: int, prompt: int, vocabulary: int) -> list[Group]:
    rng = random.Random(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocabulary) for _ in range(n))

    def sample(reward: float) -> Trajectory:
        ids = tokens(LENGTH)
        n = len(ids)
        return Trajectory(ids, (True,) * n, (0,) * n, (-10.0,) * n, FinishReason.STOP, (), "", reward)

    return [
        Group(Prompt(f"{i}", tokens(prompt), ""), tuple(sample(float(k % 2)) for k in range(SIZE)))
        for i in range(count)
    ]


def check(first: dict[str, Metrics]) -> None:
    """The same update, or nothing is reported."""
    for name in ("grad_norm", "entropy"):
        values = {who: metrics[name].value for who, metrics in first.items()}
        spread = max(values.values()) / min(values.values()) - 1
        if spread > 0.02:
            raise SystemExit(f"contenders differ in {name}: {values}")


def seconds(
    model: str, prompt: int, microbatch_tokens: int, count: int, repeats: int
) -> dict[str, list[float]]:
    ways = contenders(CONTENDERS, model, prompt, microbatch_tokens, count)
    check({name: way.update() for name, way in ways.items()})
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for repeat in range(repeats):
        order = list(CONTENDERS) if repeat % 2 == 0 else list(reversed(CONTENDERS))
        for name in order:
            start = time.perf_counter()
            ways[name].update()
            times[name].append(time.perf_counter() - start)
    return times


def peak_gib(name: str, model: str, prompt: int, microbatch_tokens: int, count: int) -> float:
    """In a process of its own: the resident size that updates add to the loaded model and its optimizer."""
    arguments = ["--model", model, "--prompt", str(prompt), "--microbatch-tokens", str(microbatch_tokens)]
    arguments += ["--groups", str(count)]
    command = [sys.executable, "-m", "benchmarks.learner", "--memory-of", name, *arguments]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_memory(name: str, model: str, prompt: int, microbatch_tokens: int, count: int) -> float:
    contender = contenders([name], model, prompt, microbatch_tokens, count)[name]
    contender.learner.optimizer.step(0, contender.learner.world)
    def kib(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    # the largest resident size counts from here, not from the loading
    Path("/proc/self/clear_refs").write_text("5")
    resident = kib("VmRSS:")
    for _ in range(2):
        contender.update()
    return (kib("VmHWM:") - resident) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prompt", type=int, nargs="+", default=[46, 128, 256, 512])
    parser.add_argument("--microbatch-tokens", type=int, default=4096)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=CONTENDERS)
    options = parser.parse_args()
    if options.memory_of:
        gib = measure_memory(
            options.memory_of, options.model, options.prompt[0], options.microbatch_tokens, options.groups
        )
        print(gib)  # noqa: T201
        return

    rows: list[dict[str, Any]] = []
    for prompt in options.prompt:
        times = seconds(options.model, prompt, options.microbatch_tokens, options.groups, options.repeats)
        medians = {name: statistics.median(t) for name, t in times.items()}
        for name in CONTENDERS:
            memory = peak_gib(name, options.model, prompt, options.microbatch_tokens, options.groups)
            row = {
                "prompt_tokens": prompt,
                "contender": name,
                "median_s": round(medians[name], 3),
                "speedup_over_padded_logits": round(medians["padded, logits"] / medians[name], 2),
                "peak_gib_of_updates": round(memory, 2),
                "all_s": [round(t, 3) for t in times[name]],
            }
            rows.append(row)
            print({k: v for k, v in row.items() if k != "all_s"}, flush=True)  # noqa: T201
    if options.out:
        result = {
            "command": "python -m benchmarks.learner " + " ".join(sys.argv[1:]),
            "work": {
                "groups": options.groups,
                "completions": SIZE,
                "tokens": LENGTH,
                "repeats": options.repeats,
            },
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
            },
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "rows": rows,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
