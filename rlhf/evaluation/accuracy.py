"""Accuracy on held-out prompts: always the same prompts, seeds and sampling, so that two evaluations
differ by the weights alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.collect.sampler import Sampler
from rlhf.config.run import Config
from rlhf.data.prompts import PromptDataset
from rlhf.distributed.world import World
from rlhf.evaluation.intervals import Z, wilson
from rlhf.rewards.success import check_objective, is_correct
from rlhf.types import Group

SHOWN = 8


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One record of RUN/eval.json."""

    step: int
    accuracy: float
    num_samples: int
    ci_low: float
    """95% interval over prompts: the samples of one prompt are not independent."""
    ci_high: float
    samples: list[dict[str, Any]]


def evaluate(
    sampler: Sampler,
    prompts: PromptDataset,
    config: Config,
    world: World,
    step: int,
    between: Callable[[], None] | None = None,
) -> Evaluation:
    """Samples `eval.samples` completions of each held-out prompt, a share a rank. The same on every rank."""
    total = len(prompts) if config.eval.max_prompts is None else min(len(prompts), config.eval.max_prompts)
    mine = [prompts[i] for i in range(world.rank, total, world.size)]
    requests = [sampler.request(p, n=config.eval.samples, label=f"eval/{p.id}") for p in mine]
    groups, _ = sampler.score(mine, sampler.generate(requests, between), step)
    check_objective(groups, config.reward)
    parts = world.gather([_record(g, config) for g in groups])
    records = [record for part in parts for record in part]
    shares = [record["right"] / record["count"] for record in records]
    low, high = interval(shares)
    return Evaluation(
        step=step,
        accuracy=sum(shares) / len(shares),
        num_samples=sum(record["count"] for record in records),
        ci_low=low,
        ci_high=high,
        samples=[record["sample"] for record in records[:SHOWN]],
    )


def interval(shares: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean share right, from the shares of single prompts (normal, over prompts).

    Where all prompts agree that has no width; Wilson's interval with a prompt as one trial stands in for it.
    """
    n, mean = len(shares), sum(shares) / len(shares)
    variance = sum((s - mean) ** 2 for s in shares) / max(1, n - 1)
    if variance > 0:
        margin = Z * math.sqrt(variance / n)
        return max(0.0, mean - margin), min(1.0, mean + margin)
    return wilson(mean, n)


def _record(group: Group, config: Config) -> dict[str, Any]:
    right = [is_correct(t, config.reward) for t in group.trajectories]
    first = group.trajectories[0]
    return {
        "right": sum(right),
        "count": len(right),
        "sample": {
            "prompt": _question(group),
            "completion": first.text,
            "reward": first.reward,
            "right": right[0],
        },
    }


def _question(group: Group) -> str:
    content = group.prompt.content
    return content if isinstance(content, str) else str(content[-1]["content"])
