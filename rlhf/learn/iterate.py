"""The iterate: the policy of the last iteration, frozen (iterative DPO, SELM, DNO, INPO, SPPO, SPAC).

Every `iteration.steps` steps it becomes the policy: iterate <- mix * policy + (1 - mix) * iterate. It holds
2 bytes a weight in bfloat16, or the two factors of a LoRA adapter, and, in a sharded run, its rank's rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoints.stateful import CheckpointError, Stateful, TensorFiles
from rlhf.checkpoints.tensor_files import rows_like
from rlhf.config.learner import IterationConfig
from rlhf.distributed.shards import own_rows
from rlhf.distributed.world import World
from rlhf.learn.experience import pack_groups
from rlhf.learn.logprobs import token_logprobs
from rlhf.models.policy import Policy, WithAdapterOf
from rlhf.models.vision.processor import Processor
from rlhf.rollout.engine import SyncError
from rlhf.types import Completion, FinishReason, Group, PackedGroups, Prompt, Trajectory


class Iterate(Stateful):
    """Holds `frozen`, the policy of the last iteration, and makes it the present policy when it is time."""

    def __init__(self, policy: Policy, frozen: Policy, section: IterationConfig) -> None:
        """`frozen` has the layers of `policy`; what its weights are at first does not matter."""
        self.policy, self.frozen, self.section = policy, frozen, section
        self.taken_at = 0
        """The number of steps that had been done when the policy was taken."""
        self._take(mix=1.0)

    def after(self, steps_done: int) -> bool:
        """Refreshes the iterate if an iteration ends with this step; returns whether it did."""
        if steps_done % self.section.steps:
            return False
        self._take(self.section.mix)
        self.taken_at = steps_done
        return True

    def check(self, prompt: Prompt, world: World, *, tolerance: float) -> None:
        """Compares log-probs of the iterate with those of the policy that it was copied from, on the second
        half of a prompt; nothing where only a share of the policy was taken.

        Raises SyncError when they differ by more than `tolerance` nats. Every rank calls it.
        """
        if self.section.mix < 1.0:
            return
        probe, budget = _halves(prompt, world), len(prompt.token_ids)
        policy, iterate = (
            token_logprobs(model, probe, world, temperature=1.0, budget=budget)
            for model in (self.policy, self.frozen)
        )
        difference = (policy - iterate).abs().max().item()
        if not difference <= tolerance:
            raise SyncError(
                f"the policy was copied to the iterate after step {self.taken_at}, but their log-probs "
                f"differ by {difference:.3g} nats: the copy is not what it should be"
            )

    @torch.no_grad()
    def _take(self, mix: float) -> None:
        policy = _weights(self.policy)
        for name, held in _weights(self.frozen).items():
            own, new = own_rows(held), own_rows(policy[name]).to(torch.float32)
            own.copy_(new if mix == 1.0 else mix * new + (1.0 - mix) * own.to(torch.float32))
        self.frozen.merge()

    def state(self) -> dict[str, Any]:
        return {"taken_at": self.taken_at}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        # until the first refresh it is the model that the run begins with
        return {"weights": dict(_weights(self.frozen))} if self.taken_at else {}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.taken_at = state["taken_at"]
        if not self.taken_at:
            return
        saved, own = tensors["weights"], _weights(self.frozen)
        if set(saved) != set(own):
            odd = ", ".join(sorted(set(saved) ^ set(own))[:3])
            raise CheckpointError(f"the checkpoint's iterate is of another model: {odd} is in one of the two")
        for name, weight in own.items():
            own_rows(weight).copy_(rows_like(saved, name, weight))
        self.frozen.merge()


def frozen_copy(policy: Policy, processor: Processor | None) -> Policy:
    """A second model like `policy`, which is whole and on this rank, or its weights with an adapter apart."""
    if policy.adapter is not None:
        return WithAdapterOf(policy)
    frozen = Policy(copy.deepcopy(policy.model), layout=policy.layout, processor=processor)
    frozen.model.eval()
    return frozen


def _halves(prompt: Prompt, world: World) -> PackedGroups:
    """The first half of the tokens as a prompt, the second as its completion."""
    ids = prompt.token_ids * 2 if len(prompt.token_ids) < 2 else prompt.token_ids
    half = len(ids) // 2
    completion = Completion(prompt.id, 0, ids[half:], None, FinishReason.STOP, versions=())
    trajectory = Trajectory.single_turn(completion, text="", reward=0.0, objectives={})
    group = Group(replace(prompt, token_ids=ids[:half], images=None), (trajectory,))
    return pack_groups([group], device=world.device)


def _weights(policy: Policy) -> Mapping[str, Tensor]:
    """What differs between two versions of a policy: its weights, or those of its adapter."""
    if isinstance(policy, WithAdapterOf):
        return policy.weights
    return dict(policy.model.named_parameters()) if policy.adapter is None else policy.adapter.weights
