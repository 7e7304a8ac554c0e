"""The models of a run (policy, reference, critic), checked once to be those that the algorithm needs."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.algos.algorithm import Algorithm
from rlhf.learn.critic import Critic
from rlhf.learn.perception.masked_passes import MaskedPasses
from rlhf.models.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """An algorithm and the models that it learns with; made only if they fit each other."""

    algorithm: Algorithm
    policy: Policy
    reference: Policy | None = None
    """The frozen model that the policy is compared with."""
    iterate: Policy | None = None
    """The policy of the last iteration, frozen; it may be the reference too."""
    critic: Critic | None = None
    perception: MaskedPasses | None = None
    """The policy's passes over masked images, for an algorithm with a perception term."""

    def __post_init__(self) -> None:
        algorithm = self.algorithm
        assert self.reference is not None or not algorithm.needs_reference
        assert self.iterate is not None or not algorithm.needs_iterate
        assert (self.critic is None) == (algorithm.critic is None)
        assert (self.perception is None) == (algorithm.perception is None)
