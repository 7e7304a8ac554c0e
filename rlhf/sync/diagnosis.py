"""Why an engine's log-probs are not the learner's: the sampling setting that explains the difference.

The engine reports the log-prob of each token it drew. If it drew from a distribution of another shape than
the learner believes, one number says how,

    temperature   log softmax(l / T')[a]
    top-k, top-p, min-p   log softmax(l / T)[a] - log(mass that is kept)

and with it the squared differences nearly vanish. Rounding leaves no such pattern, so a setting that is off
by a few percent is told from it even where the mean difference is within what rounding may do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

EXPLAINED, LIKELY = 0.25, 0.6
"""A setting is the cause when it leaves less than this share of the squared differences: the first where they
might be rounding, the second where they cannot be."""
STEP = 0.05
"""Of the logarithm of a temperature, in the first of two searches."""
SHARES = [k / 100 for k in range(2, 100)]
LARGEST_K = 256


@dataclass(frozen=True, slots=True)
class Cause:
    """`text` names it; `left` is the mean |difference| it does not explain, nats."""

    text: str
    left: float


def diagnose(
    logits: Float[Tensor, "N V"],
    tokens: Int64[Tensor, " N"],
    engine: Float[Tensor, " N"],
    temperature: float,
    left: float = EXPLAINED,
) -> Cause | None:
    """The setting that explains the engine's log-probs of `tokens`, where one does; None when they agree."""
    logits, engine = logits.double(), engine.double()
    apart = engine - _logprobs(logits, tokens, temperature)
    candidates: list[Candidate] = []
    # what a small change of temperature does, and an engine that is surer of every token, tell the two apart
    slope = (_logprobs(logits, tokens, temperature * 1.01) - _logprobs(logits, tokens, temperature)) / 0.01
    fitted = slope * ((apart @ slope) / (slope @ slope).clamp(min=1e-30))
    if (apart - fitted).square().sum() < LIKELY * apart.square().sum():
        candidates += _temperatures(logits, tokens, engine, temperature)
    if apart.mean() > 0.5 * apart.abs().mean():
        candidates += _truncations(logits, apart, temperature)
    if not candidates:
        return None
    squares, text, rest = min(candidates, key=lambda candidate: candidate[0])
    if squares > left * float(apart.square().sum()):
        return None
    return Cause(text, float(rest.abs().mean()))


Candidate = tuple[float, str, Tensor]


def _logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return _chosen((logits / temperature).log_softmax(-1), tokens)


def _chosen(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(-1, tokens[:, None])[:, 0]


def _temperatures(logits: Tensor, tokens: Tensor, engine: Tensor, temperature: float) -> Iterator[Candidate]:
    def rest_at(used: float) -> Tensor:
        return engine - _logprobs(logits, tokens, used)

    def squares(used: float) -> float:
        return float(rest_at(used).square().sum())

    rough = min((temperature * math.exp(STEP * i) for i in range(-32, 33)), key=squares)
    used = min((rough * math.exp(STEP * i / 20) for i in range(-20, 21)), key=squares)
    text = f"temperature: the engine samples at {used:.3g}, the learner scores at {temperature:.3g}"
    yield squares(used), text, rest_at(used)


def _truncations(logits: Tensor, apart: Tensor, temperature: float) -> Iterator[Candidate]:
    """What is kept has mass m: the engine's log-probs are higher by -log m."""
    ordered = (logits / temperature).softmax(-1).sort(-1, descending=True).values
    mass = ordered.cumsum(-1)
    for k in range(1, min(LARGEST_K, ordered.shape[-1])):
        rest = apart + mass[:, k - 1].log()
        yield float(rest.square().sum()), f"top-k: the engine keeps the {k} most probable tokens only", rest
    for share in SHARES:
        nucleus = mass.gather(-1, torch.lt(mass - ordered, share).sum(-1, keepdim=True) - 1)[:, 0]
        rest = apart + nucleus.log()
        yield float(rest.square().sum()), f"top-p: the engine keeps a share of {share:.2g} only", rest
        kept = ordered.masked_fill(torch.lt(ordered, share * ordered[:, :1]), 0.0).sum(-1)
        rest = apart + kept.log()
        text = f"min-p: the engine leaves out tokens below {share:.2g} of the most probable one"
        yield float(rest.square().sum()), text, rest
