"""Finds the sampling setting that explains why an engine's log-probs differ from the learner's.

The engine reports the log-prob of each token it drew. Suppose it drew with another temperature T' or
truncation than the learner assumes. Then, for logits l and the drawn token a, it reports

    temperature   log softmax(l / T')[a]
    top-k, top-p, min-p   log softmax(l / T)[a] - log(mass that is kept)

and with the right value of that one setting the squared differences to the learner nearly vanish. Rounding
has no such pattern, so a setting that is off by a few percent is found even where the mean difference is no
larger than that of rounding. But of few tokens chance explains much, and of one everything. So the fewer the
tokens are that a pattern rests on, the less it may leave unexplained: a policy that is sure of most tokens
has few others, which alone differ by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

EXPLAINED, LIKELY = 0.25, 0.6
"""A setting is the cause if it leaves at most this share of the squared differences unexplained: `EXPLAINED`
where the differences might be rounding, `LIKELY` where they are too large for that."""
CHANCE = 1e-6
"""How likely, at most, rounding is to look like a setting."""
STEP = 0.05
"""Step of the logarithm of the temperature in the search."""
REFINEMENTS = 4
"""Steps after it; each leaves about a hundredth of the error, because slopes are differences at 1 %."""
SHARES = [k / 100 for k in range(2, 100)]
"""The values of top-p and min-p that are tried."""
LARGEST_K = 256
"""The largest top-k that is tried."""


@dataclass(frozen=True, slots=True)
class Cause:
    """A sampling setting that explains the difference."""

    text: str
    """Names the setting and its values."""
    unexplained: float
    """The mean |difference| that remains, in nats."""


def diagnose(
    logits: Float[Tensor, "N V"],
    tokens: Int64[Tensor, " N"],
    engine: Float[Tensor, " N"],
    temperature: float,
    largest_share: float = EXPLAINED,
) -> Cause | None:
    """The sampling setting that explains the engine's log-probs `engine` of `tokens`; None: no setting does.

    `logits` are the learner's at temperature 1; `temperature` is the one that the engine should sample at. At
    most `largest_share` of the squared differences may remain unexplained.
    """
    logits, engine = logits.double(), engine.double()
    difference = engine - _logprobs(logits, tokens, temperature)
    explanations: list[Explanation] = []
    # a temperature is tried if the differences are mostly along the derivative of log-probs by its logarithm,
    # truncation if most of the engine's log-probs are higher than the learner's
    slope = _slope(logits, tokens, temperature)
    fitted = slope * ((difference @ slope) / (slope @ slope).clamp(min=1e-30))
    if (difference - fitted).square().sum() < LIKELY * difference.square().sum():
        explanations += _temperatures(logits, tokens, engine, temperature)
    if difference.mean() > 0.5 * difference.abs().mean():
        explanations += _truncations(logits, difference, temperature)
    if not explanations:
        return None
    squares, text, remainder = min(explanations, key=lambda explanation: explanation[0])
    if largest_share <= EXPLAINED:  # else no rounding is so large
        largest_share = min(largest_share, _largest_by_chance(difference - remainder))
    if squares > largest_share * float(difference.square().sum()):
        return None
    return Cause(text, float(remainder.abs().mean()))


def _largest_by_chance(pattern: Tensor) -> float:
    """The share that rounding leaves unexplained by `pattern` `[N]`, or less, with a probability of `CHANCE`.

    Of n independent differences a pattern with one number to choose leaves a share that is distributed as
    Beta(a, 1/2), a = (n - 1) / 2, which is below u with a probability of at most u^a. n counts the tokens of
    the pattern by their weight: (sum of squares)^2 / (sum of fourth powers).
    """
    squares = pattern.square()
    n = float(squares.sum().square() / squares.square().sum().clamp(min=1e-300))
    return CHANCE ** (2.0 / (n - 1.0)) if n > 1.0 else 0.0


Explanation = tuple[float, str, Tensor]
"""Sum of the squared differences that remain, text, and the remaining differences `[N]`."""


def _logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return _chosen((logits / temperature).log_softmax(-1), tokens)


def _chosen(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(-1, tokens[:, None])[:, 0]


def _temperatures(
    logits: Tensor, tokens: Tensor, engine: Tensor, temperature: float
) -> Iterator[Explanation]:
    """The best temperature: a rough search over its logarithm, then steps of Gauss-Newton."""

    def remainder(used: float) -> Tensor:
        return engine - _logprobs(logits, tokens, used)

    def squares(used: float) -> float:
        return float(remainder(used).square().sum())

    used = min((temperature * math.exp(STEP * i) for i in range(-32, 33)), key=squares)
    for _ in range(REFINEMENTS):
        slope = _slope(logits, tokens, used)
        change = float((remainder(used) @ slope) / (slope @ slope).clamp(min=1e-30))
        used *= math.exp(max(-STEP, min(STEP, change)))
    text = f"temperature: the engine samples at {used:.3g}, the learner scores at {temperature:.3g}"
    yield squares(used), text, remainder(used)


def _slope(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """The derivative of log-probs by the logarithm of the temperature."""
    return (_logprobs(logits, tokens, temperature * 1.01) - _logprobs(logits, tokens, temperature)) / 0.01


def _truncations(logits: Tensor, difference: Tensor, temperature: float) -> Iterator[Explanation]:
    """Every top-k, top-p and min-p: if they keep a probability mass m, log-probs are higher by -log m."""
    ordered = (logits / temperature).softmax(-1).sort(-1, descending=True).values  # [N, V]
    mass = ordered.cumsum(-1)  # [N, V]
    for k in range(1, min(LARGEST_K, ordered.shape[-1])):
        rest = difference + mass[:, k - 1].log()
        yield float(rest.square().sum()), f"top-k: the engine keeps the {k} most probable tokens only", rest
    for share in SHARES:
        # the tokens before which less than `share` of the mass lies
        nucleus = mass.gather(-1, torch.lt(mass - ordered, share).sum(-1, keepdim=True) - 1)[:, 0]
        rest = difference + nucleus.log()
        yield float(rest.square().sum()), f"top-p: the engine keeps a share of {share:.2g} only", rest
        kept = ordered.masked_fill(torch.lt(ordered, share * ordered[:, :1]), 0.0).sum(-1)
        rest = difference + kept.log()
        text = f"min-p: the engine leaves out tokens below {share:.2g} of the most probable one"
        yield float(rest.square().sum()), text, rest
