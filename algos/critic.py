"""Settings and formulas of a critic: advantages from its values (GAE), the returns it learns, reward scaling.

Differences from the papers: 1. a completion cut at its limit ends like any other, with a value of 0 after
it, as in the code of PPO-max; 2. tokens the policy did not choose are skipped; 3. the length-adaptive lambda
counts the tokens the policy chose, and is 0, not negative, up to 1 / alpha of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.algos.advantage import Advantage, steps_of, whiten
from rlhf.algos.segments import sequence_tokens
from rlhf.algos.value import RunningMoments, adaptive_lambda, value_loss
from rlhf.kernels.gae import Gae, gae
from rlhf.types import AdvantageInputs, CriticTargets


@dataclass(frozen=True, slots=True)
class CriticLoss:
    """How advantages come from values (GAE, arXiv:1506.02438) and how the values are learned.

    The model that computes the values, and its learning rate, are set in the section `critic` of a run.
    """

    gamma: float = 1.0
    """Discount of rewards and values for each token; 1: none."""
    lam: float = 0.95
    """Lambda of the policy's advantages: 1 relies on the rewards alone, 0 on the value of the next token
    alone."""
    lam_alpha: float | None = None
    """When given, lambda is 1 - 1 / (lam_alpha * length) for each completion in place of `lam` (VAPO)."""
    lam_returns: float | None = None
    """Lambda of the returns that the critic learns; None: that of the advantages (VAPO and VC-PPO: 1)."""
    value_clip: float | None = 0.2
    """How far an update may move a value: further away, the value loss has no gradient; None: any
    distance."""
    coef: float = 1.0
    """Weight of the value loss beside the policy's. It matters because both share the bound of the gradient's
    norm, and with `critic.trunk: policy` a trunk."""
    warmup_steps: int = 0
    """Steps at the start in which the critic learns and the policy is frozen; with
    `warmup_explained_variance` an upper limit."""
    warmup_explained_variance: float | None = None
    """When given, the policy starts to learn as soon as the critic explains this share of the returns'
    variance."""

    def __post_init__(self) -> None:
        for name, value in (("gamma", self.gamma), ("lam", self.lam), ("lam_returns", self.lam_returns)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"critic.{name} must lie in 0..1, got {value}")
        for name, value in (("lam_alpha", self.lam_alpha), ("value_clip", self.value_clip)):
            if value is not None and value <= 0:
                raise ValueError(f"critic.{name} must be above 0, or null for none, got {value}")
        if self.coef <= 0:
            raise ValueError(f"critic.coef must be above 0, or the critic learns nothing, got {self.coef}")
        if self.warmup_steps < 0:
            raise ValueError(f"critic.warmup_steps must be 0 or more, got {self.warmup_steps}")
        share = self.warmup_explained_variance
        if share is not None and not (share < 1 and self.warmup_steps > 0):
            raise ValueError(
                "critic.warmup_explained_variance must be below 1 and needs critic.warmup_steps, the steps "
                f"after which the policy starts all the same; got {share} and {self.warmup_steps}"
            )

    def advantages(self, inputs: AdvantageInputs) -> Tensor:
        """Advantages of all tokens for the policy, `[N]`."""
        return self._scan(inputs, self._lam(inputs)).advantages

    def targets(self, inputs: AdvantageInputs) -> CriticTargets:
        """The values before the update and the returns that the critic learns, each `[N]`."""
        assert inputs.values is not None
        lam = self._lam(inputs) if self.lam_returns is None else self.lam_returns
        return CriticTargets(values=inputs.values, returns=self._scan(inputs, lam).returns)

    def loss(self, values: Tensor, targets: CriticTargets) -> Tensor:
        """The value loss of each token, `[N]`."""
        return value_loss(values, targets.values, targets.returns, clip=self.value_clip)

    def _lam(self, inputs: AdvantageInputs) -> float | Tensor:
        if self.lam_alpha is None:
            return self.lam
        lengths = sequence_tokens(inputs.loss_mask, inputs.sequence, inputs.rewards)
        return adaptive_lambda(lengths.round().long(), alpha=self.lam_alpha).to(inputs.rewards.dtype)

    def _scan(self, inputs: AdvantageInputs, lam: float | Tensor) -> Gae:
        assert inputs.values is not None
        rewards = token_rewards(inputs)
        return gae(rewards, inputs.values, inputs.sequence, inputs.loss_mask, gamma=self.gamma, lam=lam)


def token_rewards(inputs: AdvantageInputs) -> Float[Tensor, " N"]:
    """Rewards of tokens: minus the penalty of each, at the end of a step the step's reward, and at the last
    token the policy chose what else the sequence earned."""
    mask, sequence, (at, rest) = inputs.loss_mask, inputs.sequence, steps_of(inputs)
    index = torch.arange(len(sequence), device=sequence.device)
    last = torch.full_like(inputs.rewards, -1, dtype=torch.long).scatter_reduce(
        0, sequence[mask], index[mask], "amax"
    )
    rewards = (at.nan_to_num(nan=0.0) - inputs.token_penalty).masked_fill(~mask, 0.0)
    ended = last >= 0
    return rewards.index_add(0, last[ended], rest[ended].to(rewards.dtype))


def constrained(advantage: Advantage, *, whitened: bool, clip: float | None) -> Advantage:
    """`advantage`, whitened over all tokens of the step if `whitened`, then kept in [-clip, clip]."""
    if clip is not None and clip <= 0:
        raise ValueError(f"advantage_clip must be above 0, or null for none, got {clip}")

    def function(inputs: AdvantageInputs) -> Tensor:
        result = advantage(inputs)
        if whitened:
            result = whiten(result, inputs.loss_mask, all_sum=inputs.all_sum).to(result.dtype)
        return result if clip is None else result.clamp(-clip, clip)

    return function


@dataclass(frozen=True, slots=True)
class RewardScaling:
    """How the rewards of a step are scaled by those of all steps so far (PPO-max, arXiv:2307.04964)."""

    center: bool = False
    """Whether the running mean is taken off."""
    scale: bool = False
    """Whether rewards are divided by the running standard deviation."""
    clip: float | None = None
    """Bound of the result, which is kept in [-clip, clip]; None: no bound."""

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"reward_scaling.clip must be above 0, or null for none, got {self.clip}")

    @property
    def has_memory(self) -> bool:
        """Whether earlier steps have an effect."""
        return self.center or self.scale

    def apply(self, rewards: Tensor, moments: RunningMoments, *, part: bool = False) -> Tensor:
        """The scaled rewards; `moments` already include them. Of a `part` of a reward, that of a step, the
        mean is not taken off: the rest of the reward carries it."""
        if self.center and not part:
            rewards = rewards - moments.mean
        if self.scale:
            rewards = rewards / moments.scale
        return rewards if self.clip is None else rewards.clamp(-self.clip, self.clip)


RAW = RewardScaling()
