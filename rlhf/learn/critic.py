"""The critic: trunk, value head and optimizer, and its warm-up before the policy learns.

It gives a value for every token that the policy is about to choose: V(s_t) = w . h_t, with h_t the
hidden state that the log-prob of token t is computed from too. The trunk below the head is a model of its
own, or the policy's: packing, shared prompts and checkpoints are the same.

Differences from PPO-max's code (arXiv:2307.04964): 1. policy and critic have an optimizer each; their
gradients are still clipped by one norm over both; 2. the critic can learn before the policy does, which the
paper advises and its code leaves out; 3. a head that is not loaded from a reward model starts at 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.algos.critic import CriticLoss
from rlhf.checkpoints.stateful import Stateful, TensorFiles
from rlhf.config.learner import CriticConfig, LearnerConfig
from rlhf.learn.optimizer import MasterAdamW
from rlhf.metrics import Max, Metrics
from rlhf.models.heads import scores, value_head
from rlhf.models.loading import load_trunk
from rlhf.models.packing import Packed, least
from rlhf.models.policy import Policy, Trunk
from rlhf.models.pretrained import ModelError
from rlhf.models.sharding import Sharding


class Critic(Stateful):
    """A trunk, a value head on it, and their optimizer.

    `own` is False where the trunk is the policy's; the optimizer then has the head alone.
    """

    def __init__(self, trunk: Trunk, head: nn.Linear, optimizer: MasterAdamW, *, own: bool) -> None:
        self.trunk, self.head, self.optimizer, self.own = trunk, head, optimizer, own

    @classmethod
    def on_policy_trunk(cls, policy: Policy, section: LearnerConfig, total_steps: int) -> Critic:
        """A head of zeros on the policy's hidden states; the trunk learns with the policy's optimizer."""
        head = value_head(policy.model, None, policy.model.device)
        return cls(policy, head, MasterAdamW(head, torch.float32, section, total_steps), own=False)

    @classmethod
    def on_own_trunk(
        cls,
        path: str,
        device: torch.device | Sharding,
        dtype: torch.dtype,
        section: LearnerConfig,
        total_steps: int,
        *,
        longest: int | None = None,
    ) -> Critic:
        """A critic from the model at `path`, as a whole on a device, or in shards.

        `longest` is that of `load_trunk`. Raises ModelError: there is no model at `path`, or it is a reward
        model that gives several scores.
        """
        trunk, weight = load_trunk(path, device, longest=longest)
        head = value_head(trunk.model, weight, trunk.model.device)
        if head.out_features != 1:
            raise ModelError(
                f"critic.path {path} gives {head.out_features} scores a text; a critic starts from one that "
                "gives one score, or from a causal language model"
            )
        both = nn.ModuleDict({"trunk": trunk.model, "head": head})
        return cls(trunk, head, MasterAdamW(both, dtype, section, total_steps), own=True)

    def values(self, packed: Packed, policy_hidden: Tensor | None) -> Tensor:
        """The value of each token, fp32 `[N]`.

        `policy_hidden`: the policy's hidden states of `packed`, where a pass has computed them. Without them
        (the policy is frozen) a trunk shared with the policy is frozen too, and the head alone learns.
        """
        if self.own:
            return scores(self.head, self.trunk.hidden(packed))[:, 0]
        if policy_hidden is None:
            with torch.no_grad():
                policy_hidden = self.trunk.hidden(packed)
        return scores(self.head, policy_hidden)[:, 0]

    def dummy_pass(self) -> Tensor:
        """A zero that depends on every weight.

        A rank with nothing to compute makes this pass, because a sharded model needs all ranks in each pass.
        """
        return self.values(least(self.head.weight.device), None).sum() * 0.0

    def state(self) -> dict[str, Any]:
        return self.optimizer.state()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return self.optimizer.tensors()

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.optimizer.load(state, tensors)


class Warmup(Stateful):
    """Counts the steps at the start of a run in which the critic learns and the policy is frozen."""

    def __init__(self, critic: CriticLoss | None) -> None:
        self.limit = 0 if critic is None else critic.warmup_steps
        self.explained = None if critic is None else critic.warmup_explained_variance
        self.steps, self.over = 0, self.limit == 0

    def adapt(self, metrics: Metrics) -> Metrics:
        """After each step: ends the warm-up once it is long enough, or the critic explains enough."""
        if self.limit == 0:
            return {}
        if not self.over:
            self.steps += 1
            reached = math.nan
            if "critic/explained_variance" in metrics:
                reached = metrics["critic/explained_variance"].value
            self.over = self.steps >= self.limit or (self.explained is not None and reached >= self.explained)
            return {"critic/warmup": Max(1.0)}
        return {"critic/warmup": Max(0.0)}

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "over": self.over}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.steps, self.over = state["steps"], state["over"]


def critic_section(section: CriticConfig, learner: LearnerConfig) -> LearnerConfig:
    """The learner's settings, with learning rate and eps replaced by those of the critic."""
    return learner.model_copy(update={"lr": section.lr, "eps": section.eps})
