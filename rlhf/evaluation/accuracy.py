"""Evaluates the policy on held-out prompts: accuracy with a 95% confidence interval.

Prompts, seeds and sampling are the same every time, so two evaluations differ only by the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf.collect.sampler import Sampler
from rlhf.config.run import Config
from rlhf.data.prompts import PromptDataset
from rlhf.distributed.world import World
from rlhf.evaluation.intervals import normal_interval
from rlhf.rewards.success import check_objective, is_correct
from rlhf.types import Group

SHOWN = 8
"""Most samples that are written into an evaluation record."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One record of RUN/eval.json."""

    step: int
    accuracy: float
    num_samples: int
    ci_low: float
    """Lower end of the 95% confidence interval over prompts (samples of one prompt are not independent)."""
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
    """Samples `eval.samples` completions of each held-out prompt and returns the share that is correct.

    Each rank samples a share of the prompts; all ranks return the same. `between` is called while waiting.
    """
    total = len(prompts) if config.eval.max_prompts is None else min(len(prompts), config.eval.max_prompts)
    mine = [prompts[i] for i in range(world.rank, total, world.size)]
    requests = [sampler.request(p, n=config.eval.samples, label=f"eval/{p.id}") for p in mine]
    groups, _ = sampler.score(mine, sampler.generate(requests, between), step)
    check_objective(groups, config.reward)
    parts = world.gather([_record(g, config) for g in groups])
    records = [record for part in parts for record in part]
    shares = [record["correct"] / record["count"] for record in records]
    low, high = normal_interval(shares)
    return Evaluation(
        step=step,
        accuracy=sum(shares) / len(shares),
        num_samples=sum(record["count"] for record in records),
        ci_low=low,
        ci_high=high,
        samples=[record["sample"] for record in records[:SHOWN]],
    )


def _record(group: Group, config: Config) -> dict[str, Any]:
    """What one prompt contributes: counts of correct and of all completions, and its first completion."""
    correct = [is_correct(t, config.reward) for t in group.trajectories]
    first = group.trajectories[0]
    return {
        "correct": sum(correct),
        "count": len(correct),
        "sample": {
            "prompt": _question(group),
            "completion": first.text,
            "reward": first.reward,
            "right": correct[0],
        },
    }


def _question(group: Group) -> str:
    content = group.prompt.content
    return content if isinstance(content, str) else str(content[-1]["content"])
