"""Preference methods on policies that are tables: seconds to run, with the losses that training uses.

A completion is one token, so a policy is one softmax, and `Algorithm.loss` sees pairs of such completions.
Every arm takes plain gradient steps; a row of a tensor is one run, and all runs of a method go together.

overshoot   60 completions at x in [0, 1], true reward x up to .55 and steeply falling beyond. The policy is
            reference * exp(two features of x); 200 pairs with noisy labels, all from x < .5, are the data.
            Inside the data more is better; what does a method make of that beyond it? (HyPO,
            arXiv:2406.01462; chi^2-PO, arXiv:2407.13399)
on_policy   100 completions, reward exp(-((a - 70) / 10)^2), a reference around `mu`. Each step draws 64 pairs
            from the policy or from the reference, labelled without noise (arXiv:2404.14367). mu 20 is the
            negative control: hardly any completion that is sampled has a reward.

    python -m benchmarks.preference_bandit --out benchmarks/results/<machine>/preference_bandit.json

Further arms are entries of `OVERSHOOT` and `ON_POLICY`: any `Algorithm`, one on single completions excepted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.runs import write_claims
from rlhf.algos.algorithm import KL, Algorithm
from rlhf.algos.preference.losses import ComparedGroup, Pull
from rlhf.algos.preference.pairing import Comparison
from rlhf.algos.table import ALGORITHMS
from rlhf.tensors.contrasts import Contrasts
from rlhf.types import Counts, LossInputs, Source

RECORDED = (0, 50, 100, 200, 300, 400, 800, 1600)
OVERSHOOT: dict[str, Algorithm] = {
    "dpo": ALGORITHMS["dpo"](beta=0.1),
    "chi_po": ALGORITHMS["chi_po"](beta=0.1, max_reward=1.0),
    "chi_po, bound 1": ALGORITHMS["chi_po"](beta=0.1, max_reward=0.5),
    "dpop": ALGORITHMS["dpop"](beta=0.1, lam=5.0),
    "rpo": ALGORITHMS["rpo"](beta=0.1, nll_coef=0.02),
    "hypo, .01": ALGORITHMS["hypo"](beta=0.1, kl=KL(coef=0.01, estimator="k1", placement="reward")),
    "hypo, .03": ALGORITHMS["hypo"](beta=0.1, kl=KL(coef=0.03, estimator="k1", placement="reward")),
}
ON_POLICY: dict[str, tuple[Algorithm, float]] = {
    "dpo": (ALGORITHMS["dpo"](beta=0.1), 20.0),
    "ipo": (ALGORITHMS["ipo"](tau=0.1, per_token=False), 0.2),
    # imitates the better one of each pair
    "sft": (ALGORITHMS["sft"](), 1.0),
}
"""Each with its learning rate: compare "on" with "off" within a method only."""
MEANS = (60, 45, 20)


@dataclass(frozen=True)
class Pairs:
    """Numbers of completions, `[R, n]` for R runs; `kept` is False where a pair is none."""

    better: Tensor
    other: Tensor
    kept: Tensor
    of_reference: Tensor | None = None
    """Where the better one was sampled from the reference, and the other from the policy; else it is the
    other way round. None: both are data."""


def loss(algorithm: Algorithm, policy: Tensor, reference: Tensor, pairs: Pairs) -> Tensor:
    """The sum over runs of each run's loss, a mean over its pairs; `policy` and `reference` are log-probs
    `[R, K]`."""
    run, column = pairs.kept.nonzero(as_tuple=True)
    if not len(run) and not algorithm.has_advantages:
        # as in training, a step without a pair changes nothing
        return 0.0 * policy.sum()
    share = (1.0 / pairs.kept.sum(1).clamp(min=1)).to(policy.dtype)[run]  # [M]
    # better and other of pair m are the completions 2 m and 2 m + 1, of one token each
    runs = run.repeat_interleave(2)
    tokens = torch.stack([pairs.better[run, column], pairs.other[run, column]], dim=1).flatten()
    better = torch.tensor([1.0, 0.0], dtype=policy.dtype).repeat(len(run))
    preference = algorithm.preference
    advantages = torch.zeros(len(runs), dtype=policy.dtype)
    if preference is None:
        advantages = better * share.repeat_interleave(2)
    elif algorithm.has_advantages:
        # own samples, all of them, each as often as it is sampled
        own, of_own = own_samples(algorithm, policy.detach(), reference)
        runs, tokens = torch.cat([runs, own[0]]), torch.cat([tokens, own[1]])
        advantages = torch.cat([advantages, of_own])
    logprobs, n = policy[runs, tokens], len(runs)
    zeros, everything = torch.zeros_like(logprobs).detach(), torch.ones(n, dtype=torch.bool)
    batch = LossInputs(
        logprobs=logprobs,
        entropy=zeros,
        exact_kl=None,
        old_logprobs=logprobs.detach(),
        rollout_logprobs=zeros,
        ref_logprobs=reference[runs, tokens],
        advantages=advantages,
        loss_mask=everything,
        sequence=torch.arange(n),
        turn=torch.zeros(n, dtype=torch.int64),
        # each pair has the weight that makes the sum a mean over its run
        counts=Counts(tokens=1, sequences=1, comparisons=1.0, sampled=1),
        kl_coef=0.0,
        recorded=~everything,
        contrasts=None if preference is None else contrasts_of(share),
        pull=None
        if preference is None or preference.pull is None
        else (pulls_of(preference.pull, pairs, run, column) * share[:, None]).flatten(),
    )
    return algorithm.loss(batch).loss


def own_samples(algorithm: Algorithm, policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Run and completion `[2, R K]` of all completions, and the expected advantage of each from the KL, which
    is in the reward: that of infinitely many samples, against the mean of the others.
    """
    penalty = algorithm.token_penalty(policy, reference, algorithm.kl.coef)
    p = policy.exp()
    advantages = p * ((p * penalty).sum(1, keepdim=True) - penalty)
    places = torch.cartesian_prod(*(torch.arange(n) for n in policy.shape)).T
    return places, advantages.flatten()


def pulls_of(pull: Pull, pairs: Pairs, run: Tensor, column: Tensor) -> Tensor:
    """The pull on the two completions of each pair `[M, 2]`."""

    def of(*sources: Source) -> Tensor:
        return torch.tensor(pull(ComparedGroup([Comparison(0, 1)], [1, 1], sources)), dtype=torch.float64)

    if pairs.of_reference is None:
        return of(Source.DATA, Source.DATA).expand(len(run), 2)
    is_reference = pairs.of_reference[run, column][:, None]
    either = of(Source.REFERENCE, Source.POLICY), of(Source.POLICY, Source.REFERENCE)
    return torch.where(is_reference, *either)


def contrasts_of(weight: Tensor) -> Contrasts:
    """Completion 2 m over 2 m + 1, with a certain label and this weight `[M]`."""
    m = len(weight)
    return Contrasts(
        sequence=torch.arange(2 * m),
        coefficient=torch.tensor([1.0, -1.0], dtype=weight.dtype).repeat(m),
        contrast=torch.arange(m).repeat_interleave(2),
        target=torch.ones_like(weight),
        weight=weight,
        share=torch.ones_like(weight),
        offset=torch.zeros_like(weight),
    )


@dataclass(frozen=True)
class Problem:
    """Runs of one bandit; tensors are `[K]` or `[R, K]`."""

    rewards: Tensor
    reference: Tensor
    """Log-probs."""
    features: Tensor
    """`[K, d]`: the policy is reference * exp(features @ parameters)."""
    draw: Callable[[Tensor], Pairs]
    """Log-probs of the policy `[R, K]` -> the pairs of a step."""


def learn(problem: Problem, algorithm: Algorithm, lr: float, steps: int) -> dict[str, Any]:
    """Reward and KL to the reference of each run, at the steps in `RECORDED`: `[steps, R]`; and `policy`, its
    probabilities at the end `[R, K]`."""
    runs = len(problem.reference)
    parameters = torch.zeros(runs, problem.features.shape[1], dtype=torch.float64, requires_grad=True)
    curve: dict[str, Any] = {"steps": [], "reward": [], "kl": [], "policy": []}
    for step in range(steps + 1):
        policy = (problem.reference + parameters @ problem.features.T).log_softmax(1)
        if step in RECORDED:
            p = policy.detach().exp()
            curve["steps"].append(step)
            curve["policy"] = p.tolist()
            curve["reward"].append((p * problem.rewards).sum(1).tolist())
            curve["kl"].append((p * (policy.detach() - problem.reference)).sum(1).tolist())
        value = loss(algorithm, policy, problem.reference, problem.draw(policy.detach()))
        [gradient] = torch.autograd.grad(value, parameters)
        parameters = (parameters.detach() - lr * gradient).requires_grad_()
    return curve


def overshoot(steps: int, seeds: int, arms: dict[str, Algorithm] = OVERSHOOT) -> dict[str, Any]:
    """Mean over seeds of true reward and KL along the steps, for each arm."""
    problem = beyond_the_data(seeds)
    found: dict[str, Any] = {}
    for name, algorithm in arms.items():
        curve = learn(problem, algorithm, 0.5, steps)
        found[name] = {key: [_mean(row) for row in curve[key]] for key in ("reward", "kl")}
        found[name]["steps"] = curve["steps"]
    return found


def beyond_the_data(seeds: int) -> Problem:
    x = torch.linspace(0, 1, 60, dtype=torch.float64)
    rewards = torch.where(x < 0.55, x, 0.55 - 3 * (x - 0.55)).clamp(-1, 1)
    reference = (-0.5 * ((x - 0.3) / 0.13).square()).log_softmax(0)
    behaviour = reference.exp() * (x < 0.5)
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.multinomial(behaviour.expand(seeds, -1), 200, replacement=True, generator=generator)
        for _ in range(2)
    )
    chance = torch.sigmoid(30 * (rewards[a] - rewards[b]))
    wins = torch.rand(chance.shape, generator=generator, dtype=torch.float64) < chance
    pairs = Pairs(torch.where(wins, a, b), torch.where(wins, b, a), a != b)
    features = 6 * torch.stack([x, x.square()], dim=1)
    return Problem(rewards, reference.expand(seeds, -1), features, lambda policy: pairs)


def on_policy(steps: int, seeds: int, arms: dict[str, tuple[Algorithm, float]] = ON_POLICY) -> dict[str, Any]:
    """Mean reward along the steps: of each `mu`, arm and place where pairs come from (`on`, `off`)."""
    found: dict[str, Any] = {str(mu): {} for mu in MEANS}
    for name, (algorithm, lr) in arms.items():
        curve = learn(drawn_pairs(seeds), algorithm, lr, steps)
        rewards = torch.tensor(curve["reward"]).view(-1, len(MEANS), 2, seeds).mean(3)
        for place, mu in enumerate(MEANS):
            for side, origin in enumerate(("on", "off")):
                found[str(mu)][f"{name} {origin}"] = rewards[:, place, side].tolist()
        found["steps"] = curve["steps"]
    return found


def drawn_pairs(seeds: int) -> Problem:
    """Runs in the order mu, on and off policy, seed."""
    a = torch.arange(100, dtype=torch.float64)
    rewards = (-((a - 70) / 10).square()).exp()
    references = torch.stack([(-0.5 * ((a - mu) / 12).square()).log_softmax(0) for mu in MEANS])
    reference = references.repeat_interleave(2 * seeds, dim=0)
    on = torch.tensor([True, False]).repeat_interleave(seeds).repeat(len(MEANS))[:, None]
    generator = torch.Generator().manual_seed(0)

    def draw(policy: Tensor) -> Pairs:
        chances = torch.where(on, policy, reference).exp()
        first, second = (
            torch.multinomial(chances, 64, replacement=True, generator=generator) for _ in range(2)
        )
        wins = rewards[first] > rewards[second]
        better, other = torch.where(wins, first, second), torch.where(wins, second, first)
        return Pairs(better, other, first != second)

    return Problem(rewards, reference, torch.eye(100, dtype=torch.float64), draw)


def check_overshoot(found: dict[str, Any]) -> dict[str, bool]:
    """What is expected of `overshoot`, and whether it was found."""
    dpo, chi = found["dpo"], found["chi_po"]
    at = dpo["steps"].index(200)
    checks = {
        "chi_po is nearer to the reference than dpo at step 200": chi["kl"][at] < dpo["kl"][at],
        "chi_po has more reward than dpo at step 200": chi["reward"][at] > dpo["reward"][at],
    }
    if dpo["steps"][-1] >= 1600:
        checks["dpo gains at first"] = max(dpo["reward"]) > dpo["reward"][0] + 0.05
        checks["dpo ends below its start by more than 1/2"] = dpo["reward"][-1] < dpo["reward"][0] - 0.5
        hypo = [found[name] for name in ("hypo, .01", "hypo, .03")]
        checks["hypo with .03 ends above its start"] = hypo[1]["reward"][-1] > hypo[1]["reward"][0]
        checks["the KL falls with hypo's coefficient"] = dpo["kl"][-1] > hypo[0]["kl"][-1] > hypo[1]["kl"][-1]
    return checks


def check_on_policy(found: dict[str, Any]) -> dict[str, bool]:
    """What is expected of `on_policy`, and whether it was found."""
    middle, steps = found["45"], found["steps"]
    at = steps.index(100)
    checks = {"dpo on policy beats sft on policy at step 100": middle["dpo on"][at] > middle["sft on"][at]}
    if steps[-1] < 400:
        return checks
    for name in ON_POLICY:
        gap = middle[f"{name} on"][-1] - middle[f"{name} off"][-1]
        checks[f"{name}: on policy is better by more than .25"] = gap > 0.25
    checks["dpo still rises after step 100"] = middle["dpo on"][-1] > middle["dpo on"][at]
    checks["ipo does not, its target is bounded"] = middle["ipo on"][-1] < middle["ipo on"][at] + 0.02
    far = [curve[-1] for curve in found["20"].values()]
    checks["at mu 20 every method ends below .05"] = max(far) < 0.05
    return checks


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=1600, help="of overshoot; on_policy takes a quarter")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    beyond = overshoot(options.steps, options.seeds)
    drawn = on_policy(options.steps // 4, options.seeds)
    asserted = check_overshoot(beyond) | check_on_policy(drawn)
    found = {"seeds": options.seeds, "overshoot": beyond, "on_policy": drawn}
    write_claims(options.out, "preference_bandit", begun, found, asserted)


if __name__ == "__main__":
    main()
