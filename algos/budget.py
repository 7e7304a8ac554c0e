"""How many completions each prompt gets: a knapsack of rollouts (Knapsack RL, arXiv:2509.25849).

A group teaches something only if its rewards differ. With success rate p, n rollouts are worth

    value(n, p) = (1 - p^n - (1 - p)^n) * p (1 - p)^2    P(both outcomes) * what a gradient step then gains

and the total number of rollouts of a step is fixed. One rollout more is worth less the more there are, so
taking the best next rollout, again and again, is exactly optimal; here the best ones are selected all at
once.

Differences from the paper's code: 1. the dynamic program counts 0 extra rollouts as worth 0 in place of
value(low, p), which hands everyone at least one extra: here it is worth what it is; 2. a prompt not seen
enough gets its uniform share and no more, there it also draws from what is left for p = 0 (its rate starts at
0); 3. what is left when every prompt has p strictly between 0 and 1 stays with them (a division by zero
there); 4. what they do not need goes to p = 0 and, where there is none, stays with them too (there: to p = 1
and unseen prompts); 5. they "need" the rollouts for both outcomes with probability 0.9, the `low` ones
included (there: on top).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf.metrics import Max, Mean, Metrics

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def mixed_probability(n: int, p: float) -> float:
    """P(both outcomes among `n` rollouts) at success rate `p`."""
    return 0.0 if n == 0 else 1.0 - p**n - (1.0 - p) ** n


def value(n: int, p: float) -> float:
    """What `n` rollouts of a prompt with success rate `p` are worth; most at p = 1/3, nothing at n < 2."""
    return mixed_probability(n, p) * p * (1.0 - p) ** 2


def confident_rollouts(p: float, confidence: float = 0.9) -> float:
    """Rollouts that show both outcomes with probability c, nearly: ln(1 - c) / ln(max(p, 1 - p))."""
    return math.log(1.0 - confidence) / math.log1p(-min(p, 1.0 - p))


def allocate(
    success_rates: Sequence[float | None],
    total: int,
    low: int = 2,
    high: int = 128,
    unknown: int | None = None,
) -> list[int]:
    """Rollouts of each prompt, between `low` and `high`, adding up to `total`.

    A rate of None means that the prompt has not been seen enough: it gets `unknown` rollouts, by default the
    uniform share. Prompts with equal rates may differ by one rollout, which the earlier one gets. Raises
    ValueError when no such allocation exists or a rate is not in 0..1.
    """
    count = len(success_rates)
    _check(success_rates, total, low, high)
    share = total // count if unknown is None else unknown
    rates = np.array([np.nan if p is None else p for p in success_rates], dtype=np.float64)
    unseen, failed, solved = np.isnan(rates), rates == 0.0, rates == 1.0
    mixed = ~(unseen | failed | solved)
    budget: Ints = np.full(count, low, dtype=np.int64)
    budget[unseen] = share
    remaining = total - int(budget.sum())
    if not low <= share <= high or remaining < 0:
        raise ValueError(
            f"unknown must lie in {low}..{high} and leave {low} rollouts for each of the other prompts, got "
            f"{share} for {int(unseen.sum())} of {count} prompts with a total of {total}"
        )
    # first what mixed prompts (0 < p < 1) need, then those that always failed, then the mixed ones again
    gains = _gains(rates[mixed], low, min(high, low + remaining))
    need = np.array(
        [max(math.ceil(min(confident_rollouts(p), high)), low) - low for p in rates[mixed].tolist()]
    )
    needed = min(remaining, int(need.sum())) if failed.any() else remaining
    explore = _spread(remaining - needed, int(failed.sum()), high - low)
    budget[failed] += explore
    best = _best(gains, min(remaining - int(explore.sum()), gains.size))
    budget[mixed] += best
    remaining -= int(explore.sum()) + int(best.sum())
    for others, most in ((unseen, high - share), (solved, high - low)):
        more = _spread(remaining, int(others.sum()), most)
        budget[others] += more
        remaining -= int(more.sum())
    assert remaining == 0, remaining
    return [int(n) for n in budget]


def allocate_tokens(
    success_rates: Sequence[float],
    tokens: Sequence[float],
    total: float,
    low: int = 2,
    high: int = 128,
) -> list[int]:
    """Rollouts of each prompt when one costs `tokens[i]` tokens and `total` tokens may be spent: approximate.

    The rollout with the best value per token is taken first, until the next one does not fit. What is not
    spent is less than the tokens of one rollout, unless all prompts have `high`. Raises ValueError when `low`
    rollouts of each prompt do not fit.
    """
    cost, rates = np.asarray(tokens, dtype=np.float64), np.asarray(success_rates, dtype=np.float64)
    least = low * float(cost.sum())
    if low < 1 or low > high or not (cost > 0).all() or least > total:
        raise ValueError(
            f"needs 1 <= low <= high, tokens above 0 and a total for low rollouts of each; got low {low}, "
            f"high {high}, {least:.0f} tokens at the least, total {total:.0f}"
        )
    gains = _gains(rates, low, high) / cost[:, None]
    order = np.argsort(-gains, axis=None, kind="stable")
    row = order // gains.shape[1]
    fits = np.searchsorted(np.cumsum(cost[row]), total - least, side="right")
    return [int(n) for n in low + np.bincount(row[:fits], minlength=len(rates))]


class SuccessTracker:
    """The success rate of every prompt, from its last rewards; prompts are identified by their id.

    As in the paper: the mean of the last group or of the last `window` rewards, whichever are more; None with
    fewer than `minimum`. With `prior` = (a, b) the mean of the Beta posterior instead, from the first reward
    on: it is never 0 or 1, so that a few failures are not taken for a prompt that always fails.
    """

    def __init__(
        self,
        *,
        window: int = 16,
        minimum: int = 8,
        threshold: float = 0.5,
        prior: tuple[float, float] | None = None,
    ) -> None:
        if not 1 <= minimum <= window:
            raise ValueError(f"needs 1 <= minimum <= window, got minimum {minimum}, window {window}")
        self._window = window
        self._minimum = minimum
        self._threshold = threshold
        self._prior = prior
        # a character for each outcome, "1" for a success, the newest last: small in memory, and fit for JSON
        self._recent: dict[str, str] = {}

    def update(self, prompt_id: str, rewards: Sequence[float]) -> None:
        """Adds the rewards of one group of a prompt; a reward of `threshold` or more is a success."""
        latest = self._outcomes(rewards)
        keep = max(self._window, len(latest))
        self._recent[prompt_id] = (self._recent.get(prompt_id, "") + latest)[-keep:]

    def rate(self, prompt_id: str, also: Sequence[float] = ()) -> float | None:
        """The success rate in 0..1, None if too little is known; `also`: further rewards to count."""
        recent = self._recent.get(prompt_id, "") + self._outcomes(also)
        successes = recent.count("1")
        if self._prior is not None and recent:
            a, b = self._prior
            return (successes + a) / (len(recent) + a + b)
        return successes / len(recent) if len(recent) >= self._minimum else None

    def smoothed(self, prompt_id: str) -> float:
        """The success rate with one success and one failure added: never 0 or 1, and 1/2 when nothing is
        known."""
        recent = self._recent.get(prompt_id, "")
        return (recent.count("1") + 1) / (len(recent) + 2)

    def _outcomes(self, rewards: Sequence[float]) -> str:
        """One character for each reward: "1" for a success, else "0"."""
        return "".join("1" if reward >= self._threshold else "0" for reward in rewards)

    def state_dict(self) -> dict[str, str]:
        """The history of every prompt, as plain data for JSON."""
        return dict(self._recent)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned. Raises ValueError for anything else."""
        for prompt_id, recent in state.items():
            if not isinstance(recent, str) or set(recent) - {"0", "1"}:
                raise ValueError(
                    f"success history of {prompt_id!r} must be a string of 0 and 1, got {recent!r}"
                )
        self._recent = dict(state)


def budget_metrics(rewards: Tensor, group: Tensor, *, threshold: float = 0.5) -> Metrics:
    """How useful the rollouts of a step were; `rewards` and `group` are `[S]`, a missing reward is NaN.

    `budget/effective_ratio` is the share of rollouts in groups whose rewards differ (std > 0) and
    `budget/effective_prompts` that of the prompts with such groups. `budget/solved_A_B` is the share of
    prompts with a success rate above A and up to B percent; rates of 0 and of 100 have metrics of their own,
    and 80 belongs to the bucket above, as in the paper. `budget/size_A_B` is the mean number of rollouts of
    these prompts; a bucket without prompts has none. Without any reward there are no metrics.
    """
    known = ~rewards.isnan()
    rewards, group = rewards[known].double(), group[known]
    size = group.bincount()
    seen = size > 0
    top = torch.full(size.shape, -math.inf, dtype=torch.float64, device=group.device)
    top = top.scatter_reduce(0, group, rewards, "amax")
    bottom = -torch.full_like(top, -math.inf).scatter_reduce(0, group, -rewards, "amax")
    mixed = (top > bottom) & seen
    solved = torch.zeros_like(top).index_add(0, group, (rewards >= threshold).double()) / size.clamp(min=1)
    prompts = int(seen.sum())
    if not prompts:
        return {}
    buckets = {
        "0": solved == 0,
        "0_20": (solved > 0) & (solved <= 0.2),
        "20_80": (solved > 0.2) & (solved < 0.8),
        "80_100": (solved >= 0.8) & (solved < 1),
        "100": solved == 1,
    }
    return {
        "budget/effective_ratio": Mean(int(size[mixed].sum()), len(rewards)),
        "budget/effective_prompts": Mean(int(mixed.sum()), prompts),
        "budget/largest": Max(int(size.max())),
        **{
            f"budget/solved_{name}": Mean(int((in_bucket & seen).sum()), prompts)
            for name, in_bucket in buckets.items()
        },
        **{
            f"budget/size_{name}": Mean(int(size[in_bucket & seen].sum()), int((in_bucket & seen).sum()))
            for name, in_bucket in buckets.items()
            if (in_bucket & seen).any()
        },
    }


def _check(success_rates: Sequence[float | None], total: int, low: int, high: int) -> None:
    """Raises ValueError when there is no allocation, or a rate is not in 0..1."""
    count = len(success_rates)
    if not 1 <= low <= high:
        raise ValueError(f"a budget needs 1 <= low <= high, got low {low}, high {high}")
    if not low * count <= total <= high * count or count == 0:
        raise ValueError(
            f"{count} prompts with {low}..{high} rollouts each take a total of "
            f"{low * count}..{high * count}, got {total}"
        )
    for i, p in enumerate(success_rates):
        if p is not None and not 0.0 <= p <= 1.0:
            raise ValueError(f"a success rate must lie in 0..1 or be None, got {p} for prompt {i}")


def _gains(p: Floats, low: int, high: int) -> Floats:
    """The value of one rollout more, `[prompts, high - low]`: column k is for rollout number low + k + 1.

        value(n + 1, p) - value(n, p) = (p^n (1 - p) + (1 - p)^n p) * p (1 - p)^2

    Computed by products alone, so that equal rates have bitwise equal gains at any place in the array.
    """
    gains = np.empty((len(p), high - low))
    q = 1.0 - p
    up, down = q, p
    for n in range(high):
        if n >= low:
            gains[:, n - low] = (up + down) * p * q * q
        up, down = up * p, down * q
    return gains


def _best(gains: Floats, take: int) -> Ints:
    """How many of the `take` largest gains are in each row. Rows decrease; of equal gains those of earlier
    rows are taken first."""
    if take == 0:
        return np.zeros(len(gains), dtype=np.int64)
    threshold = np.partition(gains, gains.size - take, axis=None)[gains.size - take]
    above = np.count_nonzero(gains > threshold, axis=1)
    equal = np.count_nonzero(gains == threshold, axis=1)
    # gains that equal the threshold, those of earlier rows first, until there are `take`
    before = np.cumsum(equal) - equal
    return above + np.clip(take - int(above.sum()) - before, 0, equal)


def _spread(amount: int, count: int, most: int) -> Ints:
    """`amount` in `count` equal shares of at most `most`. A remainder goes to the first shares; what exceeds
    `count * most` is in none."""
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    amount = min(amount, count * most)
    shares = np.full(count, amount // count, dtype=np.int64)
    shares[: amount % count] += 1
    return shares
