"""One domain after another: what is left of the first, and what the sum of two adapters keeps of both.

A policy of one layer writes strings of eight letters, each by itself: its logits are W x, where the unit
vector x is the domain (.6 is the product of the two domains' vectors). A domain gives each letter a score; of
two strings the one with the higher sum is chosen, but one label of ten is wrong. W has a LoRA adapter, and
learns by `Algorithm.loss` and AdamW. 400 held-out pairs of each domain, with right labels, are ordered by the
log-ratio to the policy that everything begins with.

    a                 the first domain alone
    b                 the second domain alone
    a then b          a run on the second domain that begins with the policy of the first, which is its
                      reference too (`model.path`)
       , first reference    the same with the first policy of all as the reference (`model.reference`)
    a / 2 + b / 2     the sum of two adapters that began alike, as `rlhf combine` makes it

Each once with `dpo` and once with `ofs_dpo`, with as many updates and one learning rate.

    python -m benchmarks.continual --out FILE.json --figure FILE.png
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from benchmarks.runs import machine
from rlhf.algos.algorithm import Algorithm
from rlhf.algos.preference.losses import margins
from rlhf.algos.table import ALGORITHMS
from rlhf.models.adapter_files import AdapterFile, combine
from rlhf.tensors.contrasts import Contrasts, Rival
from rlhf.types import Counts, LossInputs

LETTERS, LENGTH, WIDTH, RANK, SCALE = 16, 8, 12, 4, 2.0
PAIRS, HELD_OUT, BATCH, STEPS, LR = 320, 400, 32, 60, 2e-2
PRODUCT, WRONG, BETA = 0.6, 0.1, 0.5
SEEDS = (0, 1, 2)
METHODS: dict[str, Algorithm] = {
    "dpo": ALGORITHMS["dpo"](beta=BETA),
    "ofs_dpo": ALGORITHMS["ofs_dpo"](beta=BETA, interval=20),
}
ARMS = ("a", "b", "a then b", "a then b, first reference", "a / 2 + b / 2")


@dataclass(frozen=True)
class Domain:
    """The vector of a domain `[WIDTH]`; pairs of strings of letters, chosen first, `[PAIRS, 2, LENGTH]`."""

    x: Tensor
    train: Tensor
    held_out: Tensor


Adapter = tuple[Tensor, Tensor]
"""A `[RANK, WIDTH]` and B `[LETTERS, RANK]`."""


def make_domains(seed: int) -> tuple[Domain, Domain]:
    generator = torch.Generator().manual_seed(seed)

    def pairs(scores: Tensor, count: int, wrong: float) -> Tensor:
        texts = torch.randint(LETTERS, (count, 2, LENGTH), generator=generator)
        sums = scores[texts].sum(-1)
        ahead = sums[:, 0] > sums[:, 1]
        right = ahead ^ (torch.rand(count, generator=generator) < wrong)
        return torch.where(right[:, None, None], texts, texts.flip(1))

    made: list[Domain] = []
    for x in ([1.0, 0.0], [PRODUCT, math.sqrt(1 - PRODUCT**2)]):
        scores = torch.randn(LETTERS, generator=generator)
        vector = torch.tensor(x + [0.0] * (WIDTH - 2))
        made.append(Domain(vector, pairs(scores, PAIRS, WRONG), pairs(scores, HELD_OUT, 0.0)))
    return made[0], made[1]


def change(adapter: Adapter) -> Tensor:
    """What an adapter adds to W."""
    down, up = adapter
    return SCALE * up @ down


def logprobs(weight: Tensor, domain: Domain, pairs: Tensor) -> Tensor:
    """Of every letter, `[pairs * 2 * LENGTH]`."""
    return (weight @ domain.x).log_softmax(0)[pairs.flatten()]


def inputs(policy: Tensor, reference: Tensor, pairs: int) -> LossInputs:
    """What the loss sees of these log-probs, of pairs of strings."""
    sequences, zeros = 2 * pairs, torch.zeros(len(policy))
    ones = torch.ones(pairs)
    return LossInputs(
        logprobs=policy,
        entropy=zeros,
        exact_kl=None,
        old_logprobs=policy.detach(),
        rollout_logprobs=zeros,
        ref_logprobs=reference,
        advantages=zeros,
        loss_mask=zeros == 0,
        sequence=torch.arange(sequences).repeat_interleave(LENGTH),
        turn=torch.zeros(len(policy), dtype=torch.int64),
        counts=Counts(tokens=len(policy), sequences=sequences, comparisons=float(pairs)),
        kl_coef=0.0,
        recorded=zeros > 0,
        contrasts=Contrasts(
            sequence=torch.arange(sequences),
            coefficient=torch.tensor([1.0, -1.0]).repeat(pairs),
            contrast=torch.arange(pairs).repeat_interleave(2),
            target=ones,
            weight=ones,
            share=ones,
            offset=0 * ones,
        ),
    )


def train(algorithm: Algorithm, start: Tensor, frozen: Tensor, domain: Domain, seed: int) -> Adapter:
    """Trains an adapter on `start`, and with a chase a second one; returns the fast one. `frozen`: W of the
    reference.

    Every adapter begins with the same A.
    """
    down = torch.randn(RANK, WIDTH, generator=torch.Generator().manual_seed(1)) / math.sqrt(WIDTH)
    chase = algorithm.chase
    rates = [LR] if chase is None else [LR, LR * chase.lr_ratio]
    copies = [(down.clone().requires_grad_(), torch.zeros(LETTERS, RANK, requires_grad=True)) for _ in rates]
    optimizers = [torch.optim.AdamW(c, lr, weight_decay=0.0) for c, lr in zip(copies, rates, strict=True)]
    shuffle, losses = torch.Generator().manual_seed(seed), [0.0] * len(copies)
    for step in range(STEPS):
        pairs = domain.train[torch.randint(PAIRS, (BATCH,), generator=shuffle)]
        reference = logprobs(frozen, domain, pairs)
        batches = [inputs(logprobs(start + change(c), domain, pairs), reference, BATCH) for c in copies]
        if chase is not None:
            preference = algorithm.preference
            assert preference is not None
            fast, slow = (margins(batch, preference).detach() for batch in batches)
            rivals = Rival(slow, is_slow=True), Rival(fast, is_slow=False)
            batches = [replace(batch, rival=rival) for batch, rival in zip(batches, rivals, strict=True)]
        for i, (batch, optimizer) in enumerate(zip(batches, optimizers, strict=True)):
            optimizer.zero_grad()
            output = algorithm.loss(batch)
            output.loss.backward()
            optimizer.step()
            losses[i] += output.metrics["pairs/loss"].value
        if chase is not None and (step + 1) % chase.interval == 0:
            if losses[1] < losses[0]:
                copies.reverse()
                optimizers.reverse()
            losses = [0.0, 0.0]
    return copies[0][0].detach(), copies[0][1].detach()


@torch.no_grad()
def accuracy(weight: Tensor, domain: Domain) -> float:
    """The share of held-out pairs that the log-ratio to W = 0 orders rightly; a tie counts half."""
    sums = logprobs(weight, domain, domain.held_out).view(HELD_OUT, 2, LENGTH).sum(-1)
    # W = 0 gives every string the same log-prob
    return ((sums[:, 0] - sums[:, 1]).sign().mean().item() + 1) / 2


def added(one: Adapter, two: Adapter) -> Tensor:
    """What half of one adapter and half of the other add to W together."""
    files = [AdapterFile(Path(), "", {}, {"w": (down, SCALE * up)}) for down, up in (one, two)]
    down, up = combine(files, [0.5, 0.5])["w"]
    return up @ down


def measure(method: str, seed: int) -> list[dict[str, Any]]:
    algorithm, (a, b) = METHODS[method], make_domains(seed)
    start = torch.zeros(LETTERS, WIDTH)
    of_a, of_b = (train(algorithm, start, start, domain, seed) for domain in (a, b))
    first = change(of_a)
    own = first + change(train(algorithm, first, first, b, seed))
    common = first + change(train(algorithm, first, start, b, seed))
    weights = dict(zip(ARMS, (first, change(of_b), own, common, added(of_a, of_b)), strict=True))
    return [
        {"method": method, "seed": seed, "arm": arm, "a": accuracy(w, a), "b": accuracy(w, b)}
        for arm, w in weights.items()
    ]


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By method and arm: the mean accuracy in each domain and in both, and its range."""
    found: dict[str, dict[str, float]] = {}
    for method in METHODS:
        for arm in ARMS:
            some = [row for row in rows if (row["method"], row["arm"]) == (method, arm)]
            both = [(row["a"] + row["b"]) / 2 for row in some]
            values = {domain: statistics.mean(row[domain] for row in some) for domain in "ab"}
            values |= {"both": statistics.mean(both), "smallest": min(both), "largest": max(both)}
            found[f"{method}, {arm}"] = {name: round(value, 4) for name, value in values.items()}
    return found


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy in the first domain against that in the second: a dot a seed."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained", sharex=True, sharey=True)
    for axis, method in zip(axes, METHODS, strict=True):
        for number, arm in enumerate(ARMS):
            some = [row for row in rows if (row["method"], row["arm"]) == (method, arm)]
            # a ring, within which another arm may lie
            shape: dict[str, Any] = {"facecolors": "none", "s": 110} if arm == "a then b" else {}
            points = [r["a"] for r in some], [r["b"] for r in some]
            axis.scatter(
                *points, edgecolors=f"C{number}", label=arm, **({"facecolors": f"C{number}"} | shape)
            )
        axis.set(title=method, xlabel="accuracy, domain a", ylabel="accuracy, domain b")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True)
    options = parser.parse_args()
    rows = [row for method in METHODS for seed in SEEDS for row in measure(method, seed)]
    results = {
        "command": "python -m benchmarks.continual --out FILE.json --figure FILE.png",
        "machine": machine(),
        "means": means(rows),
        "rows": rows,
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    draw(rows, options.figure)


if __name__ == "__main__":
    main()
