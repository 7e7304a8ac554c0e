"""A flow-matching policy on points of the plane, trained on a reward in two ways side by side; standalone.

    AWM         sample a point x0, draw times t and noise e anew, and weigh the loss of the pre-training by
                the advantage: A |v(x_t, t) - (e - x0)|^2 with x_t = (1 - t) x0 + t e  (arXiv:2509.25050)
    Flow-GRPO   sample x0 step by step with noise, and learn each step as a Gaussian action:
                -A log N(x_next; mean(x, v(x, t)), sigma_t^2 dt)                       (arXiv:2505.05470)

For a language model the loss of the pre-training is -log p(token), and weighed by the advantage it is the
policy gradient: there AWM is GRPO (tests/algos/test_ideas.py). A flow has no log p at hand. Flow-GRPO makes
one by adding noise to the sampler; what it regresses on is the noise of a step, where AWM has the clean
sample. That is why AWM's gradient is said to have less variance, and to need fewer samples.

What differs from the papers: 1. one "prompt", so the advantage is standardised over the whole batch; 2. one
update for each batch, so all ratios are 1 and no clip acts; no KL; 3. sigma_t = a sqrt(t), where Flow-GRPO
has a sqrt(t / (1 - t)), which is infinite at the first step. Any sigma_t keeps the distribution of the
samples.

    python examples/flow/flow.py --out flow.json --figure flow.png        less than a minute on one CPU core
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 10
"""Steps of a sampler."""
NOISE = 0.7
"""a of Flow-GRPO's sampler."""
MODES, RADIUS, WIDTH = 8, 2.0, 0.2
"""The data: Gaussians on a ring."""


class Velocity(nn.Module):
    """v(x, t): how points move with the time, from data at t = 0 to noise at t = 1."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """`x` `[B, 2]`, `t` `[B]` -> `[B, 2]`."""
        time = torch.stack([t, torch.sin(math.pi * t), torch.cos(math.pi * t)], dim=1)
        return self.layers(torch.cat([x, time], dim=1))


Flow = Callable[[Tensor, Tensor], Tensor]
"""A velocity: a `Velocity`, or any function of `x` `[B, 2]` and `t` `[B]`."""


def data(count: int, random: torch.Generator) -> Tensor:
    """Points of the data, `[count, 2]`."""
    angle = torch.randint(MODES, (count,), generator=random) * (2 * math.pi / MODES)
    modes = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
    return modes + WIDTH * torch.randn(count, 2, generator=random)


def reward(x: Tensor) -> Tensor:
    """1 at the rightmost mode, less the further away from it, `[B]`."""
    return torch.exp(-(x - torch.tensor([RADIUS, 0.0])).square().sum(1) / 2)


def matching_loss(flow: Flow, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The loss of the pre-training: the velocity is to point from the data to the noise, `[B]`."""
    x = (1 - t)[:, None] * x0 + t[:, None] * noise
    return (flow(x, t) - (noise - x0)).square().mean(1)


@torch.no_grad()
def sample(flow: Flow, noise: Tensor) -> Tensor:
    """Points `[B, 2]` from noise, by Euler steps along the velocity from t = 1 to 0."""
    x = noise
    for step in range(STEPS):
        x = x - flow(x, torch.full((len(x),), 1 - step / STEPS)) / STEPS
    return x


def step_mean(flow: Flow, x: Tensor, t: Tensor) -> Tensor:
    """Mean of the point one noisy step later, `[B, 2]`.

    The velocity, and a drift along the score, -(x + (1 - t) v) / t, times sigma_t^2 / 2, which undoes what
    the noise does to the distribution.
    """
    v = flow(x, t)
    return x - (v + NOISE**2 / 2 * (x + (1 - t)[:, None] * v)) / STEPS


@torch.no_grad()
def sample_noisily(flow: Flow, noise: Tensor, random: torch.Generator) -> list[Tensor]:
    """The points of each time, from the noise to the sample: `STEPS + 1` of `[B, 2]`."""
    path = [noise]
    for step in range(STEPS):
        t = torch.full((len(noise),), 1 - step / STEPS)
        deviation = NOISE * (t / STEPS).sqrt()[:, None]
        path.append(step_mean(flow, path[-1], t) + deviation * torch.randn(noise.shape, generator=random))
    return path


def advantages(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def awm_loss(flow: Flow, count: int, score: Callable[[Tensor], Tensor], random: torch.Generator) -> Tensor:
    """AWM's loss of `count` new samples, at as many times as Flow-GRPO has steps: one in each of STEPS equal
    parts of 0 to 1, the same for all samples, with new noise."""
    x0 = sample(flow, torch.randn(count, 2, generator=random))
    weights, loss = advantages(score(x0)), torch.zeros(())
    for part in range(STEPS):
        t = ((part + torch.rand((), generator=random)) / STEPS).expand(count)
        loss = loss + (weights * matching_loss(flow, x0, t, torch.randn(count, 2, generator=random))).mean()
    return loss / STEPS


def flow_grpo_loss(
    flow: Flow, count: int, score: Callable[[Tensor], Tensor], random: torch.Generator
) -> Tensor:
    """Flow-GRPO's loss of `count` new samples: the policy gradient of the noisy steps."""
    path = sample_noisily(flow, torch.randn(count, 2, generator=random), random)
    weights, loss = advantages(score(path[-1])), torch.zeros(())
    for step in range(STEPS):
        t = torch.full((count,), 1 - step / STEPS)
        variance = NOISE**2 * t / STEPS
        error = (path[step + 1] - step_mean(flow, path[step], t)).square().sum(1)
        loss = loss + (weights * error / (2 * variance)).mean()
    return loss


LOSSES = {"AWM": awm_loss, "Flow-GRPO": flow_grpo_loss}


def pretrained(seed: int, updates: int = 3000) -> Velocity:
    """A flow of the data."""
    torch.manual_seed(seed)
    random, flow = torch.Generator().manual_seed(seed), Velocity()
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    for _ in range(updates):
        t, noise = torch.rand(256, generator=random), torch.randn(256, 2, generator=random)
        optimizer.zero_grad()
        matching_loss(flow, data(256, random), t, noise).mean().backward()
        optimizer.step()
    return flow


def noise_to_signal(flow: Velocity, method: str, seed: int, batches: int = 100, count: int = 64) -> float:
    """Variance of the gradient over batches, summed over the weights, by the squared length of its mean."""
    random, gradients = torch.Generator().manual_seed(seed), list[Tensor]()
    for _ in range(batches):
        loss = LOSSES[method](flow, count, reward, random)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(flow.parameters()))]))
    stacked = torch.stack(gradients)
    variance = stacked.var(0).sum()
    # the mean of so many batches has a share of the variance in its length, too
    return float(variance / (stacked.mean(0).square().sum() - variance / batches).clamp(min=1e-12))


def trained(start: Velocity, method: str, seed: int, lr: float, updates: int, count: int) -> list[float]:
    """The mean reward of 2000 samples without noise, before the first update and after each tenth."""
    flow, random = Velocity(), torch.Generator().manual_seed(seed)
    flow.load_state_dict(start.state_dict())
    optimizer, held_out = torch.optim.Adam(flow.parameters(), lr=lr), torch.randn(2000, 2, generator=random)
    curve = [float(reward(sample(flow, held_out)).mean())]
    for update in range(1, updates + 1):
        optimizer.zero_grad()
        LOSSES[method](flow, count, reward, random).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        if update % 10 == 0:
            curve.append(float(reward(sample(flow, held_out)).mean()))
    return curve


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib import pyplot as plt

    figure, (curves, noise) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for number, method in enumerate(LOSSES):
        mine = [row for row in rows if row["method"] == method]
        for row in mine:
            curves.plot(row["samples"], row["reward"], color=f"C{number}", alpha=0.3, linewidth=0.8)
        means = [statistics.mean(values) for values in zip(*(row["reward"] for row in mine), strict=True)]
        curves.plot(mine[0]["samples"], means, color=f"C{number}", label=method)
        noise.scatter([method] * len(mine), [row["noise_to_signal"] for row in mine], color=f"C{number}")
    curves.set(xlabel="samples", title="mean reward, three seeds")
    noise.set(yscale="log", title="variance of the gradient / |mean|^2, 64 samples")
    curves.legend()
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="AWM and Flow-GRPO on points of the plane")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=64, help="of an update")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(3):
        start = pretrained(seed)
        for method in LOSSES:
            curve = trained(start, method, seed, options.lr, options.updates, options.samples)
            row = {"method": method, "seed": seed, "noise_to_signal": noise_to_signal(start, method, seed)}
            rows.append(
                row | {"samples": [10 * options.samples * i for i in range(len(curve))], "reward": curve}
            )
            sys.stdout.write(f"{row} reward {curve[0]:.3f} -> {curve[-1]:.3f}\n")
    options.out.write_text(
        json.dumps({"lr": options.lr, "samples of an update": options.samples, "rows": rows}, indent=1) + "\n"
    )
    if options.figure is not None:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
