"""The table of all algorithms by name: functions whose keyword arguments are the settings of `algorithm:`.

A default is the paper's value, or else that of the authors' code; a setting without a default must be given.
An algorithm that differs from another in some parts only is written as that one with these parts replaced.
docs/algorithms.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from rlhf.algos import surrogate
from rlhf.algos.advantage import (
    by_step,
    by_turn,
    gdpo_advantage,
    group_center,
    group_normalize,
    leave_one_out,
    per_sequence,
    reinforce_pp_advantage,
    reinforce_pp_baseline_advantage,
)
from rlhf.algos.algorithm import KL, NO_KL, TOKEN_TIS, Algorithm, Mismatch
from rlhf.algos.critic import RAW, CriticLoss, RewardScaling, constrained
from rlhf.algos.imitation import IMITATION
from rlhf.algos.preference.online_table import ONLINE_PREFERENCE
from rlhf.algos.preference.table import PREFERENCE
from rlhf.algos.preference.two_roles import TWO_ROLES
from rlhf.algos.ratio import sequence_ratio, token_ratio
from rlhf.algos.reduction import (
    sequence_mean_constant,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_mean,
    turn_means,
)
from rlhf.algos.shaping import Selection, keep_mixed, overlong

GRPO_KL = KL(coef=0.04)
RLOO_KL = KL(coef=0.03, estimator="k1", placement="reward")
REINFORCE_PP_KL = KL(coef=0.01, estimator="k1", placement="reward")
REINFORCE_PP_BASELINE_KL = KL(coef=0.001, estimator="k2")
PPO_KL = KL(coef=0.02, estimator="k1", placement="reward")
PPO_MAX_KL = KL(coef=0.05, estimator="k1", placement="reward")
PPO_CRITIC = CriticLoss(lam=0.95)
PPO_MAX_CRITIC = CriticLoss(lam=0.9)
VAPO_CRITIC = CriticLoss(lam_alpha=0.05, lam_returns=1.0, value_clip=None, warmup_steps=50)
NORMALIZED = RewardScaling(center=True, scale=True, clip=10.0)
CLASH = (
    "advantages are whitened or clipped and values clipped too: in the experiments of PPO-max (figure 14) "
    "the two get in each other's way; set algorithm.critic.value_clip to null, or algorithm.whiten to false "
    "and algorithm.advantage_clip to null"
)

# laid out by hand: one algorithm is one short paragraph
# fmt: off


def grpo(
    *, clip_low: float = 0.2, clip_high: float = 0.2, clip_dual: float | None = None,
    kl: KL = GRPO_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """Group relative policy optimization, arXiv:2402.03300."""
    return Algorithm(
        advantage=per_sequence(group_normalize),
        ratio=token_ratio,
        surrogate=surrogate.clipped(low=clip_low, high=clip_high, dual=clip_dual),
        reduction=sequence_mean_token_mean,
        kl=kl, mismatch=mismatch, entropy_coef=entropy_coef,
    )


def grpo_ps(
    *, clip_low: float = 0.2, clip_high: float = 0.2, clip_dual: float | None = None,
    kl: KL = GRPO_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """GRPO with process supervision: advantages from rewards of steps, arXiv:2402.03300 section 4.1.3."""
    base = grpo(clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual,
                kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, advantage=by_step, compares_steps=True)


def dr_grpo(
    *, max_tokens: int, clip_low: float = 0.2, clip_high: float = 0.2, clip_dual: float | None = None,
    kl: KL = NO_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """GRPO divided neither by a standard deviation nor by a length, arXiv:2503.20783."""
    base = grpo(clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual,
                kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, advantage=per_sequence(group_center),
                   reduction=partial(sequence_mean_constant, max_tokens=max_tokens))


def dapo(
    *, max_tokens: int, overlong_cache: int | None = None, refill: int = 9, drop_truncated: bool = False,
    clip_low: float = 0.2, clip_high: float = 0.28, clip_dual: float | None = 10.0,
    kl: KL = NO_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """GRPO: unequal bounds, mean over tokens, mixed groups only, overlong penalty, arXiv:2503.14476."""
    base = grpo(clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual,
                kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    shape = overlong(max_tokens, max_tokens // 5 if overlong_cache is None else overlong_cache)
    selection = Selection(keep=keep_mixed, refill=refill, drop_truncated=drop_truncated)
    return replace(base, reduction=token_mean, shape_reward=shape, selection=selection)


def gspo(
    *, clip_low: float = 3e-4, clip_high: float = 4e-4, clip_dual: float | None = None,
    kl: KL = NO_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """GRPO with the ratio of the whole sequence, arXiv:2507.18071."""
    base = grpo(clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual,
                kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, ratio=sequence_ratio)


def cispo(
    *, clip_high: float, clip_low: float | None = None, max_tokens: int, overlong_cache: int | None = None,
    refill: int = 9, kl: KL = NO_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """DAPO that clips the weight of a token's gradient, not the gradient, arXiv:2506.13585 (MiniMax-M1)."""
    base = dapo(max_tokens=max_tokens, overlong_cache=overlong_cache, refill=refill,
                kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, surrogate=partial(surrogate.cispo, low=clip_low, high=clip_high))


def sapo(
    *, tau_positive: float = 1.0, tau_negative: float = 1.05,
    kl: KL = NO_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """GRPO with a soft gate in place of the clip, arXiv:2511.20347."""
    gate = partial(surrogate.sapo, tau_positive=tau_positive, tau_negative=tau_negative)
    return replace(grpo(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef), surrogate=gate)


def discovered_po(
    *, positive: float = 2.0, negative: float = 0.6,
    kl: KL = NO_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """GRPO with a learned drift in place of the clip: Discovered Policy Optimisation, arXiv:2210.05639."""
    if positive <= 0 or negative <= 0:
        raise ValueError(f"positive and negative must be above 0, got {positive} and {negative}")
    penalty = partial(surrogate.drift, positive=positive, negative=negative)
    return replace(grpo(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef), surrogate=penalty)


def rloo(
    *, kl: KL = RLOO_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """REINFORCE against the mean of the others, a completion as one action, arXiv:2402.14740."""
    base = grpo(kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, advantage=per_sequence(leave_one_out), surrogate=surrogate.reinforce,
                   reduction=sequence_mean_token_sum)


def reinforce_pp(
    *, clip_low: float = 0.2, clip_high: float = 0.2, clip_dual: float | None = None,
    kl: KL = REINFORCE_PP_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """PPO with the whitened reward-to-go as the advantage, without groups, arXiv:2501.03262."""
    base = grpo(clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual,
                kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, advantage=reinforce_pp_advantage, reduction=token_mean)


def reinforce_pp_baseline(
    *, clip_low: float = 0.2, clip_high: float = 0.2, clip_dual: float | None = None,
    kl: KL = REINFORCE_PP_BASELINE_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """REINFORCE++ with the group's mean as the baseline, arXiv:2501.03262."""
    base = reinforce_pp(clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual,
                        kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, advantage=reinforce_pp_baseline_advantage)


def gdpo(
    *, clip_low: float = 0.2, clip_high: float = 0.2, clip_dual: float | None = None,
    kl: KL = NO_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """GRPO with each objective of the reward normalised separately, arXiv:2601.05242."""
    if kl.coef and kl.placement == "reward":
        raise ValueError("gdpo normalises objectives, and a KL is not one: kl.placement must be loss")
    base = grpo(clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual,
                kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, advantage=gdpo_advantage)


def dtpo(
    *, tool_objectives: tuple[str, ...], tool_coef: float = 0.3, earlier_weight: float = 1.0,
    clip_low: float = 0.2, clip_high: float = 0.24, clip_dual: float | None = None,
    kl: KL = NO_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """GRPO with advantages and means by turn, for turns that call a tool, arXiv:2512.03794."""
    base = grpo(clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual,
                kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, advantage=by_turn(tool_objectives, tool_coef), objectives=tool_objectives,
                   reduction=turn_means(earlier_weight))


def ppo(
    *, critic: CriticLoss = PPO_CRITIC, reward_scaling: RewardScaling = RAW, whiten: bool = True,
    advantage_clip: float | None = None, clip_low: float = 0.2, clip_high: float = 0.2,
    kl: KL = PPO_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """Proximal policy optimization with a critic, as language models use it, arXiv:1707.06347."""
    base = grpo(clip_low=clip_low, clip_high=clip_high, kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    clash = (whiten or advantage_clip is not None) and critic.value_clip is not None
    advantage = constrained(critic.advantages, whitened=whiten, clip=advantage_clip)
    return replace(base, advantage=advantage, reduction=token_mean, critic=critic,
                   reward_scaling=reward_scaling, cautions=(CLASH,) if clash else ())


def ppo_max(
    *, critic: CriticLoss = PPO_MAX_CRITIC, reward_scaling: RewardScaling = NORMALIZED, whiten: bool = False,
    advantage_clip: float | None = None, clip_low: float = 0.2, clip_high: float = 0.2,
    kl: KL = PPO_MAX_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """PPO that scales rewards by their running moments and leaves advantages raw, arXiv:2307.04964."""
    base = ppo(critic=critic, reward_scaling=reward_scaling, whiten=whiten, advantage_clip=advantage_clip,
               clip_low=clip_low, clip_high=clip_high, kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    if base.cautions:
        raise ValueError(CLASH)
    return base


def vapo(
    *, critic: CriticLoss = VAPO_CRITIC, imitation_coef: float = 0.1, whiten: bool = True,
    clip_low: float = 0.2, clip_high: float = 0.28,
    kl: KL = NO_KL, mismatch: Mismatch = TOKEN_TIS, entropy_coef: float = 0.0,
) -> Algorithm:
    """PPO: critic warm-up, lambda by length, plus NLL of correct completions, arXiv:2504.05118."""
    base = ppo(critic=critic, whiten=whiten, clip_low=clip_low, clip_high=clip_high,
               kl=kl, mismatch=mismatch, entropy_coef=entropy_coef)
    return replace(base, imitation_coef=imitation_coef)


# fmt: on

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "grpo": grpo,
    "grpo_ps": grpo_ps,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "discovered_po": discovered_po,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "gdpo": gdpo,
    "dtpo": dtpo,
    **IMITATION,
    **PREFERENCE,
    **ONLINE_PREFERENCE,
    **TWO_ROLES,
    "ppo": ppo,
    "ppo_max": ppo_max,
    "vapo": vapo,
}
