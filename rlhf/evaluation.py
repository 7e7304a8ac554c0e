"""Accuracy on held-out prompts: always the same prompts, seeds and sampling, so that two evaluations differ by the
weights alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rlhf.budgets import is_right
from rlhf.collector import Sampler
from rlhf.config import Config
from rlhf.data import PromptDataset
from rlhf.distributed import World
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


def evaluate(sampler: Sampler, prompts: PromptDataset, config: Config, world: World, step: int) -> Evaluation:
    """Samples `eval.samples` completions of each held-out prompt, each rank its share. The same on every rank."""
    total = len(prompts) if config.eval.max_prompts is None else min(len(prompts), config.eval.max_prompts)
    mine = [prompts[i] for i in range(world.rank, total, world.size)]
    requests = [sampler.request(p, n=config.eval.samples, label=f"eval/{p.id}") for p in mine]
    groups, _ = sampler.score(mine, sampler.generate(requests), step)
    parts = world.gather([_record(g, config) for g in groups])
    records = [record for part in parts for record in part]
    shares = [record["right"] / record["count"] for record in records]
    accuracy = sum(shares) / len(shares)
    variance = sum((s - accuracy) ** 2 for s in shares) / max(1, len(shares) - 1)
    margin = 1.96 * math.sqrt(variance / len(shares))
    return Evaluation(
        step=step,
        accuracy=accuracy,
        num_samples=sum(record["count"] for record in records),
        ci_low=max(0.0, accuracy - margin),
        ci_high=min(1.0, accuracy + margin),
        samples=[record["sample"] for record in records[:SHOWN]],
    )


def _record(group: Group, config: Config) -> dict[str, Any]:
    right = [is_right(t, config.reward) for t in group.trajectories]
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
