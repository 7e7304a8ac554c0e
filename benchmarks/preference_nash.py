"""Online preference methods on policies that are tables, with the losses that training uses; seconds to run.

cycle     Three completions that beat each other in a circle, so that no reward explains the preferences, and
          a reference that favours the first. The expected gradient of each method, over all pairs. Where does
          it end: at the Nash point of the regularised game, or elsewhere? (arXiv:2403.08635, 2312.00886,
          2407.00617)
explore   100 completions, the best ones four deviations away from the reference; pairs of one sample of the
          policy and one of the reference. Does XPO's alpha find them sooner? With a second, lower hill beside
          the reference, which is the negative control, it should not. (arXiv:2405.21046)

    python -m benchmarks.preference_nash --out benchmarks/results/<machine>/preference_nash.json
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.preference_bandit import Pairs, Problem, learn
from benchmarks.runs import write_claims
from rlhf.algos.algorithm import KL, Algorithm
from rlhf.algos.table import ALGORITHMS
from rlhf.tensors.contrasts import Contrasts
from rlhf.types import AdvantageInputs, Counts, LossInputs, Source

TAU, SHARE, EDGE = 0.1, 0.25, 0.7
"""The weight of the KL in the game, the reference's share in the mixture, P along the circle."""
REFERENCE = (0.7, 0.2, 0.1)
ITERATION = 100
"""Steps after which the iterate becomes the policy."""


@dataclass(frozen=True)
class Arm:
    """A method on the circle, and what samples its pairs."""

    algorithm: Algorithm
    lr: float
    source: Source = Source.POLICY


NASH_KL = KL(coef=TAU, estimator="k1", placement="reward")
CYCLE: dict[str, Arm] = {
    "online dpo": Arm(ALGORITHMS["dpo"](beta=0.1), 9.0),
    "online ipo": Arm(ALGORITHMS["ipo"](tau=TAU, per_token=False), 0.06),
    "ipo_md": Arm(ALGORITHMS["ipo"](tau=TAU, per_token=False), 0.06, Source.MIXTURE),
    "nash_md": Arm(ALGORITHMS["nash_md"](kl=NASH_KL), 0.9),
    "inpo": Arm(ALGORITHMS["inpo"](eta=0.3, tau=TAU), 0.06, Source.ITERATE),
    "dno": Arm(ALGORITHMS["dno"](eta=0.3), 9.0, Source.ITERATE),
}


def preferences() -> Tensor:
    """P(row beats column) `[3, 3]`: each beats the next one in the circle."""
    p, q = EDGE, 1.0 - EDGE
    return torch.tensor([[0.5, p, q], [q, 0.5, p], [p, q, 0.5]], dtype=torch.float64)


def nash_point(tau: float = TAU) -> Tensor:
    """The policy that is the best answer to itself: policy = reference * exp(P(. beats policy) / tau)."""
    reference, wins = _reference(), preferences()
    log_policy = reference
    for _ in range(20000):
        answer = (reference + wins @ log_policy.exp() / tau).log_softmax(0)
        log_policy = (0.99 * log_policy + 0.01 * answer).log_softmax(0)
    return log_policy.exp()


def mixture(log_policy: Tensor, share: float = SHARE) -> Tensor:
    """Log-probs of the geometric mixture of policy and reference."""
    return ((1.0 - share) * log_policy + share * _reference()).log_softmax(-1)


def cycle(steps: int, arms: dict[str, Arm] = CYCLE, iteration: int = ITERATION) -> dict[str, Any]:
    """Where each method ends, its distance to the Nash point, and how much the best answer to it wins."""
    target = nash_point()
    found: dict[str, Any] = {"nash": target.tolist()}
    for name, arm in arms.items():
        end = _follow(arm, steps, iteration)
        wins = (preferences() @ end).max().item() - 0.5
        distance = (end - target).abs().max().item()
        found[name] = {"policy": end.tolist(), "distance": distance, "best_answer_wins": wins}
    return found


def _follow(arm: Arm, steps: int, iteration: int) -> Tensor:
    logits = _reference().clone().requires_grad_()
    iterate = _reference()
    for step in range(steps):
        log_policy = logits.log_softmax(0)
        if step % iteration == 0:
            iterate = log_policy.detach()
        value = _expected(arm, log_policy, iterate)
        [gradient] = torch.autograd.grad(value, logits)
        logits = (logits.detach() - arm.lr * gradient).requires_grad_()
    return logits.detach().softmax(0)


def _expected(arm: Arm, log_policy: Tensor, iterate: Tensor) -> Tensor:
    """The expected loss: over all pairs of completions, each as probable as it is to be sampled."""
    policy, wins = log_policy.detach(), preferences()
    drawn = {Source.POLICY: policy, Source.ITERATE: iterate, Source.MIXTURE: mixture(policy)}[arm.source]
    zeros = torch.zeros(3, dtype=torch.float64)
    advantages = zeros
    if arm.algorithm.preference is None:
        # against the mixture; each completion counts with its own probability
        inputs = _advantage_inputs(wins @ mixture(policy).exp(), TAU * (policy - _reference()))
        advantages = policy.exp() * arm.algorithm.advantage(inputs)
    r = wins @ iterate.exp()
    labels = torch.sigmoid(r[:, None] - r) if arm.algorithm.needs_iterate and _is_dno(arm) else wins
    first, second = torch.tensor([(i, j) for i in range(3) for j in range(3) if i != j]).unbind(1)
    batch = LossInputs(
        logprobs=log_policy,
        entropy=zeros,
        exact_kl=None,
        old_logprobs=policy,
        rollout_logprobs=zeros,
        ref_logprobs=_reference(),
        advantages=advantages,
        loss_mask=torch.ones(3, dtype=torch.bool),
        sequence=torch.arange(3),
        turn=torch.zeros(3, dtype=torch.int64),
        counts=Counts(tokens=3, sequences=1, comparisons=1.0),
        kl_coef=0.0,
        recorded=torch.zeros(3, dtype=torch.bool),
        contrasts=_contrasts(first, second, labels[first, second], drawn.exp()),
        iterate_logprobs=iterate,
    )
    return arm.algorithm.loss(batch).loss


def _is_dno(arm: Arm) -> bool:
    return arm.algorithm.preference is not None and "reference" not in arm.algorithm.preference.uses


def _contrasts(first: Tensor, second: Tensor, target: Tensor, chances: Tensor) -> Contrasts:
    m = len(first)
    return Contrasts(
        sequence=torch.stack([first, second], dim=1).flatten(),
        coefficient=torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(m),
        contrast=torch.arange(m).repeat_interleave(2),
        target=target,
        weight=chances[first] * chances[second],
        share=torch.ones_like(target),
        offset=torch.zeros_like(target),
    )


def _advantage_inputs(rewards: Tensor, penalty: Tensor) -> AdvantageInputs:
    each = torch.arange(3)
    return AdvantageInputs(
        rewards=rewards,
        objectives=rewards[:, None],
        objective_weights=torch.ones(1),
        group=torch.zeros(3, dtype=torch.int64),
        token_penalty=penalty,
        sequence=each,
        loss_mask=torch.ones(3, dtype=torch.bool),
        turn=torch.zeros_like(each),
    )


def _reference() -> Tensor:
    return torch.tensor(REFERENCE, dtype=torch.float64).log()


ALPHAS = (0.0, 0.05, 0.1, 0.2)
DRAWN = 16
"""Pairs of a step."""


def explore(steps: int, seeds: int) -> dict[str, Any]:
    """Mean reward at the end, by alpha, of XPO with far completions alone and with a hill nearby."""
    found: dict[str, Any] = {}
    for name, nearby in (("far", 0.0), ("with a hill nearby", 0.3)):
        problem = hills(seeds, nearby)
        found[name] = {}
        for alpha in ALPHAS:
            curve = learn(problem, ALGORITHMS["xpo"](beta=0.1, alpha=alpha), 20.0, steps)
            found[name][str(alpha)] = sum(curve["reward"][-1]) / seeds
    return found


def hills(seeds: int, nearby: float) -> Problem:
    """A hill of rewards far from the reference, and another of the height `nearby` beside it."""
    a = torch.arange(100, dtype=torch.float64)
    rewards = (-((a - 70) / 10).square()).exp() + nearby * (-((a - 25) / 10).square()).exp()
    reference = (-0.5 * ((a - 30) / 10).square()).log_softmax(0)
    centres = torch.linspace(0, 99, 12, dtype=torch.float64)
    features = (-0.5 * ((a[:, None] - centres) / 9).square()).exp()
    generator = torch.Generator().manual_seed(0)

    def draw(policy: Tensor) -> Pairs:
        def sample(chances: Tensor) -> Tensor:
            return torch.multinomial(chances, DRAWN, replacement=True, generator=generator)

        own, other = sample(policy.exp()), sample(reference.expand(seeds, -1).exp())
        wins = rewards[own] > rewards[other]
        better, worse = torch.where(wins, own, other), torch.where(wins, other, own)
        return Pairs(better, worse, own != other, of_reference=~wins)

    return Problem(rewards, reference.expand(seeds, -1), features, draw)


def check_cycle(found: dict[str, Any]) -> dict[str, bool]:
    """What is expected of `cycle`, and whether it was found."""
    one, other = (torch.tensor(found[name]["policy"]) for name in ("ipo_md", "nash_md"))
    return {
        "online ipo ends within 1e-3 of the Nash point": found["online ipo"]["distance"] < 1e-3,
        "inpo ends within 1e-3 of the Nash point": found["inpo"]["distance"] < 1e-3,
        "ipo_md and nash_md end at one point": (one - other).abs().max().item() < 2e-3,
        "online dpo ends elsewhere": found["online dpo"]["distance"] > 0.1,
    }


def check_explore(found: dict[str, Any]) -> dict[str, bool]:
    """What is expected of `explore`, and whether it was found."""
    far, control = (list(found[name].values()) for name in ("far", "with a hill nearby"))
    return {
        "more alpha is more reward at a fixed sampler": far == sorted(far) and far[-1] > far[0] + 0.1,
        "the largest alpha costs reward where a hill is nearby": control[-1] < control[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6000, help="of cycle; explore takes 300")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    circle, hill = cycle(options.steps), explore(300, options.seeds)
    asserted = check_cycle(circle) | check_explore(hill)
    found = {"seeds": options.seeds, "cycle": circle, "explore": hill}
    write_claims(options.out, "preference_nash", begun, found, asserted)


if __name__ == "__main__":
    main()
