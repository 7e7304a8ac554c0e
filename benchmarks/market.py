"""Feedback in hindsight on a policy that is a table, with the DPO loss that training uses; seconds to run.

A customer asks whether a product has a feature, which 3 of 10 products have. The assistant knows it and says
yes, no, or that it does not know; the customer then buys with a probability of .95, .1 or .4. The utility is
1 if they bought a product with the feature, -1 if they bought one without it, and 0 if they did not buy. Each
step samples two answers for each customer, and DPO learns which was rated higher:

immediate   before the purchase: 1 after a yes, 0 after no knowledge, -.3 after a no
hindsight   after it: the utility

(RLHS, arXiv:2501.08617; examples/market has it as an environment of conversations.)

    python -m benchmarks.market --out benchmarks/results/<machine>/market.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.preference_bandit import Pairs, Problem, learn
from benchmarks.runs import write_claims
from rlhf.algos.table import ALGORITHMS

ANSWERS = ("yes", "no", "unknown")
BUYS = torch.tensor([0.95, 0.1, 0.4], dtype=torch.float64)
"""Probability of a purchase after each answer."""
PLEASES = torch.tensor([1.0, -0.3, 0.0], dtype=torch.float64)
NOISE = 0.1
"""Standard deviation of both ratings."""
TRUTHS = ("without", "with")
SHARES = torch.tensor([0.7, 0.3], dtype=torch.float64)
"""Of products without and with the feature."""
WORTH = torch.tensor([-1.0, 1.0], dtype=torch.float64)
"""The utility of a purchase."""
CUSTOMERS = 16
"""Pairs of a step for each truth."""


def market(hindsight: bool, steps: int, seeds: int) -> dict[str, Any]:
    """The policy by truth and answer, mean over seeds; and of each seed the expected rating before the
    purchase and the expected utility, at the start and at the end."""
    problem = customers(hindsight, seeds)
    curve = learn(problem, ALGORITHMS["dpo"](beta=0.1), 2.5, steps)
    first, last = problem.reference.exp(), torch.tensor(curve["policy"], dtype=torch.float64)
    by_truth = last.view(len(TRUTHS), seeds, len(ANSWERS)).mean(1)
    found: dict[str, Any] = {
        "policy": {
            truth: dict(zip(ANSWERS, row, strict=True))
            for truth, row in zip(TRUTHS, by_truth.tolist(), strict=True)
        }
    }
    for name, of_answer in (("rating", PLEASES.expand_as(first)), ("utility", problem.rewards)):
        for when, policy in (("at the start", first), ("at the end", last)):
            mean = SHARES @ (policy * of_answer).sum(1).view(len(TRUTHS), seeds)
            found[f"{name} {when}"] = mean.tolist()
    return found


def customers(hindsight: bool, seeds: int) -> Problem:
    """Runs in the order truth, seed: the policy knows the truth, so the truths share nothing."""
    worth = WORTH.repeat_interleave(seeds)[:, None]
    uniform = torch.zeros(len(worth), len(ANSWERS), dtype=torch.float64).log_softmax(1)
    generator = torch.Generator().manual_seed(0)

    def rated(answers: Tensor) -> Tensor:
        chance = torch.rand(answers.shape, generator=generator, dtype=torch.float64)
        noise = NOISE * torch.randn(answers.shape, generator=generator, dtype=torch.float64)
        bought = chance < BUYS[answers]
        return noise + (bought * worth if hindsight else PLEASES[answers])

    def draw(policy: Tensor) -> Pairs:
        first, second = (
            torch.multinomial(policy.exp(), CUSTOMERS, replacement=True, generator=generator)
            for _ in range(2)
        )
        wins = rated(first) > rated(second)
        return Pairs(torch.where(wins, first, second), torch.where(wins, second, first), first != second)

    return Problem(BUYS * worth, uniform, torch.eye(len(ANSWERS), dtype=torch.float64), draw)


def check(immediate: dict[str, Any], hindsight: dict[str, Any]) -> dict[str, bool]:
    """What is expected, of every seed, and whether it was found."""

    def rises(found: dict[str, Any], name: str, by: float) -> bool:
        pairs = zip(found[f"{name} at the start"], found[f"{name} at the end"], strict=True)
        return all((end - start) * (1 if by > 0 else -1) > abs(by) for start, end in pairs)

    return {
        "immediate: the rating rises by more than .5": rises(immediate, "rating", 0.5),
        "immediate: the utility falls by more than .1": rises(immediate, "utility", -0.1),
        "immediate: a product without the feature is promised": immediate["policy"]["without"]["yes"] > 0.9,
        "hindsight: the utility rises by more than .3": rises(hindsight, "utility", 0.3),
        "hindsight: a product without the feature is denied": hindsight["policy"]["without"]["no"] > 0.8,
        "hindsight: a product with it is promised": hindsight["policy"]["with"]["yes"] > 0.8,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    immediate, hindsight = (market(late, options.steps, options.seeds) for late in (False, True))
    found = {"seeds": options.seeds, "steps": options.steps, "immediate": immediate, "hindsight": hindsight}
    write_claims(options.out, "market", begun, found, check(immediate, hindsight))


if __name__ == "__main__":
    main()
