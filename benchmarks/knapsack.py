"""Do budgets by success rate waste fewer rollouts than equal budgets? A simulation with known success curves.

Prompt i has difficulty d_i ~ N(0, 4.5^2) and is solved with probability sigmoid(skill - d_i); the skill rises
in a straight line over the steps, the same for every rule, so that only the budgets differ. At the end about
40 % of the groups are all correct and 20 % all wrong, as the paper reports of late GRPO training
(arXiv:2509.25849). Rules:

    uniform    8 rollouts for each of the 256 prompts of a step
    knapsack   `allocate` on the rates that a `SuccessTracker` has seen, which are one epoch old
    prior      the same with a Beta(1, 1) prior, so rates exist after one visit and are never 0 or 1
    probes     2 of the 8 rollouts first, the other 6 on the posterior after them, in every epoch
    oracle     `allocate` on the true rates

The result is the share of rollouts in groups with both outcomes.
Run: `python -m benchmarks.knapsack --out FILE`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.runs import machine
from rlhf.algos.budget import SuccessTracker, allocate, budget_metrics, value
from rlhf.metrics import merge

PROMPTS, PER_STEP, SHARE, EPOCHS = 2048, 256, 8, 16
SPREAD, SKILL_FIRST, SKILL_LAST = 4.5, -1.7, 1.3
PROBES = 2
SEEDS = range(5)
Rates = list[float | None]


def simulate(rule: str, seed: int) -> dict[str, Any]:
    """One run: metrics of every epoch, how many prompts were ever solved, and the seconds `allocate` took."""
    random = np.random.default_rng(seed)
    difficulty = random.normal(0.0, SPREAD, PROMPTS)
    tracker = SuccessTracker(prior=(1.0, 1.0) if rule in ("prior", "probes") else None)
    steps = EPOCHS * PROMPTS // PER_STEP
    epochs: list[dict[str, float]] = []
    solved: set[int] = set()
    seconds: list[float] = []
    parts = []
    for step in range(steps):
        first = step * PER_STEP % PROMPTS
        chosen = range(first, first + PER_STEP)
        skill = SKILL_FIRST + (SKILL_LAST - SKILL_FIRST) * step / (steps - 1)
        truth = 1.0 / (1.0 + np.exp(difficulty[first : first + PER_STEP] - skill))
        probes = [draw(random, PROBES if rule == "probes" else 0, p) for p in truth]
        rates: dict[str, Callable[[], Rates]] = {
            "uniform": lambda: [None] * PER_STEP,
            "oracle": lambda truth=truth: [float(p) for p in truth],
        }
        known = rates.get(rule, lambda chosen=chosen, probes=probes: known_to(tracker, chosen, probes))()
        start = time.perf_counter()
        budgets = allocate(known, PER_STEP * SHARE)
        seconds.append(time.perf_counter() - start)
        rewards = [
            np.concatenate([probe, draw(random, n - len(probe), p)])
            for probe, n, p in zip(probes, budgets, truth, strict=True)
        ]
        for i, reward in zip(chosen, rewards, strict=True):
            tracker.update(str(i), [float(r) for r in reward])
            solved |= {i} if reward.any() else set()
        group = torch.arange(PER_STEP).repeat_interleave(torch.tensor(budgets))
        worth = sum(value(n, float(p)) for n, p in zip(budgets, truth, strict=True)) / PER_STEP
        parts.append((budget_metrics(torch.from_numpy(np.concatenate(rewards)), group), worth))
        if first + PER_STEP == PROMPTS:
            metrics = {key: part.value for key, part in merge(m for m, _ in parts).items()}
            epochs.append(metrics | {"value": statistics.mean(w for _, w in parts)})
            parts = []
    return {"epochs": epochs, "ever_solved": len(solved), "seconds": statistics.median(seconds)}


def draw(random: np.random.Generator, n: int, p: float) -> np.ndarray:
    """Draws the rewards of `n` rollouts."""
    return (random.random(n) < p).astype(np.float32)


def known_to(tracker: SuccessTracker, chosen: range, probes: Sequence[np.ndarray]) -> Rates:
    return [
        tracker.rate(str(i), also=[float(r) for r in probe]) for i, probe in zip(chosen, probes, strict=True)
    ]


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds. The totals leave out the first epoch, the same for most rules."""

    def mean(key: str, epochs: slice) -> float:
        return statistics.mean(epoch[key] for run in runs for epoch in run["epochs"][epochs])

    each = range(len(runs[0]["epochs"]))
    return {
        "effective_ratio": round(mean("budget/effective_ratio", slice(1, None)), 4),
        "effective_ratio_last_epoch": round(mean("budget/effective_ratio", slice(-1, None)), 4),
        "effective_ratio_by_epoch": [round(mean("budget/effective_ratio", slice(e, e + 1)), 4) for e in each],
        "effective_prompts": round(mean("budget/effective_prompts", slice(1, None)), 4),
        "all_right_last_epoch": round(mean("budget/solved_100", slice(-1, None)), 4),
        "all_wrong_last_epoch": round(mean("budget/solved_0", slice(-1, None)), 4),
        "value_per_prompt": round(mean("value", slice(1, None)), 5),
        "largest_budget": max(int(epoch["budget/largest"]) for run in runs for epoch in run["epochs"]),
        "prompts_ever_solved": statistics.mean(run["ever_solved"] for run in runs),
        "allocate_milliseconds": round(1e3 * statistics.median(run["seconds"] for run in runs), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Share of useful rollouts, knapsack against uniform budgets."
    )
    parser.add_argument("--out", type=Path, help="where to write the figures, as JSON")
    out = parser.parse_args().out
    rules = {
        rule: summarise([simulate(rule, seed) for seed in SEEDS])
        for rule in ("uniform", "knapsack", "prior", "probes", "oracle")
    }
    base = rules["uniform"]["effective_ratio"]
    result = {
        "question": "share of rollouts in groups with both outcomes, at equal rollouts",
        "command": "python -m benchmarks.knapsack" + (f" --out {out}" if out else ""),
        "setting": {
            "prompts": PROMPTS,
            "prompts_per_step": PER_STEP,
            "rollouts_per_prompt": SHARE,
            "epochs": EPOCHS,
            "seeds": len(SEEDS),
            "difficulty_std": SPREAD,
            "skill": [SKILL_FIRST, SKILL_LAST],
        },
        "rules": rules,
        "gain_over_uniform": {
            rule: {
                "points": round(figures["effective_ratio"] - base, 4),
                "relative": round(figures["effective_ratio"] / base - 1, 4),
            }
            for rule, figures in rules.items()
            if rule != "uniform"
        },
        "paper": "the effective ratio rises by 20 to 40 % (arXiv:2509.25849, abstract)",
        "machine": machine() | {"numpy": np.__version__},
    }
    text = json.dumps(result, indent=1) + "\n"
    sys.stdout.write(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


if __name__ == "__main__":
    main()
