"""Evaluates the policy on held-out prompts: accuracy and mean reward, each with a 95% interval.

Prompts, seeds and sampling are the same every time, so two evaluations differ only by the weights. An
`Evaluation` may have what held-out pairs say beside that, or alone (`rlhf.evaluation.pairs`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

from rlhf.collect.sampler import Sampler
from rlhf.config.run import Config
from rlhf.data.prompts import PromptDataset
from rlhf.distributed.world import World
from rlhf.evaluation.intervals import mean_interval, share_interval
from rlhf.evaluation.pairs import SHOWN, PairResult
from rlhf.rewards.success import check_objective, is_correct
from rlhf.types import FinishReason, Group


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One record of RUN/eval.json: of samples of held-out prompts, of held-out pairs, or of both."""

    step: int
    accuracy: float | None
    """Share of correct completions: those whose success value reaches `reward.success_threshold`. None, as
    all other figures of samples: no samples were made."""
    num_samples: int
    ci_low: float | None
    """Lower end of the 95% interval over prompts (samples of one prompt are not independent)."""
    ci_high: float | None
    samples: list[dict[str, Any]]
    num_prompts: int
    measure: Literal["accuracy", "reward", "pairs"]
    """`accuracy` where "correct" means something: a success objective is set, or all rewards are 0 or 1.
    `pairs` where no samples were made."""
    reward: float | None
    """Mean over prompts of the mean reward of their samples; None where no sample got a reward."""
    reward_low: float | None
    """Lower end of its 95% interval over prompts."""
    reward_high: float | None
    truncated: float | None
    """Share of samples cut at `rollout.max_completion_tokens`."""
    no_signal: float | None
    """Share of prompts whose samples all got the same reward (no signal); None with one sample of each."""
    pairs: PairResult | None = None
    """What the held-out pairs say; None where there are none."""

    @property
    def score(self) -> float:
        """By which checkpoints are compared: accuracy or reward of samples, else the accuracy of pairs."""
        if self.measure == "reward" and self.reward is not None:
            return self.reward
        if self.accuracy is not None:
            return self.accuracy
        assert self.pairs is not None
        return self.pairs.accuracy


def with_pairs(sampled: Evaluation | None, pairs: PairResult, step: int) -> Evaluation:
    """The evaluation of samples and pairs, or of pairs alone where no samples were made."""
    if sampled is not None:
        return replace(sampled, pairs=pairs)
    return Evaluation(
        step=step,
        accuracy=None,
        num_samples=0,
        ci_low=None,
        ci_high=None,
        samples=[],
        num_prompts=0,
        measure="pairs",
        reward=None,
        reward_low=None,
        reward_high=None,
        truncated=None,
        no_signal=None,
        pairs=pairs,
    )


def evaluate(
    sampler: Sampler,
    prompts: PromptDataset,
    config: Config,
    world: World,
    step: int,
    between: Callable[[], None] | None = None,
    detail: Callable[[str], None] | None = None,
) -> Evaluation:
    """Samples `eval.samples` completions of each held-out prompt and returns the share that is correct.

    Each rank samples a share of the prompts; all ranks return the same. `between` is called while waiting,
    `detail` with how far it is, in words.
    """
    total = len(prompts) if config.eval.max_prompts is None else min(len(prompts), config.eval.max_prompts)
    mine = [prompts[i] for i in range(world.rank, total, world.size)]
    requests = [sampler.request(p, n=config.eval.samples, label=f"eval/{p.id}") for p in mine]
    completions = sampler.generate(requests, between, detail)
    # samples of one policy win half of their duels with each other, whatever it has learned
    with sampler.rewards.without_judge():
        groups, _ = sampler.score(mine, completions, step)
    check_objective(groups, config.reward)
    parts = world.gather([_record(g, config) for g in groups])
    records = [record for part in parts for record in part]
    return _summary(records, step, has_objective=config.reward.success_objective is not None)


def _summary(records: list[dict[str, Any]], step: int, *, has_objective: bool) -> Evaluation:
    """Of all ranks' prompts, from what `_record` says of each."""
    shares = [record["correct"] / record["count"] for record in records]
    rewards: list[list[float]] = [record["rewards"] for record in records if record["rewards"]]
    means = [fmean(of_prompt) for of_prompt in rewards]
    several = [of_prompt for of_prompt in rewards if len(of_prompt) > 1]
    binary = all(reward in (0.0, 1.0) for of_prompt in rewards for reward in of_prompt)
    low, high = share_interval(shares)
    reward_low, reward_high = mean_interval(means) if means else (None, None)
    count = sum(record["count"] for record in records)
    return Evaluation(
        step=step,
        accuracy=fmean(shares),
        num_samples=count,
        ci_low=low,
        ci_high=high,
        samples=[record["sample"] for record in records[:SHOWN]],
        num_prompts=len(records),
        measure="accuracy" if has_objective or binary else "reward",
        reward=fmean(means) if means else None,
        reward_low=reward_low,
        reward_high=reward_high,
        truncated=sum(record["truncated"] for record in records) / count,
        no_signal=fmean(len(set(of_prompt)) == 1 for of_prompt in several) if several else None,
    )


def _record(group: Group, config: Config) -> dict[str, Any]:
    """What one prompt contributes: counts, rewards, and its first completion."""
    correct = [is_correct(t, config.reward) for t in group.trajectories]
    first = group.trajectories[0]
    return {
        "correct": sum(correct),
        "count": len(correct),
        "rewards": [t.reward for t in group.trajectories if t.reward is not None],
        "truncated": sum(t.finish_reason == FinishReason.LENGTH for t in group.trajectories),
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
