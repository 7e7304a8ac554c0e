"""The models of a run (policy, reference, critic), checked once to be those that the algorithm needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.algos.algorithm import Algorithm
from rlhf.learn.critic import Critic
from rlhf.learn.perception.masked_passes import MaskedPasses
from rlhf.models.policy import Policy
from rlhf.torch_typed import integers
from rlhf.types import Group, PackedGroups


@dataclass(frozen=True, slots=True)
class References:
    """Several frozen models, of which each prompt names the one that the policy is compared with there.

    Example: `References({"math": a, "chat": b}, "teacher")` for prompts whose column `teacher` is math or
    chat.
    """

    models: Mapping[str, Policy]
    """By name, in the same order on all ranks. Two names may have the same model."""
    column: str
    """The column of the data that has one of these names."""

    def numbers(self, groups: Sequence[Group]) -> Tensor:
        """int64 `[P]`: the place in `models` of the one that each group's prompt names."""
        places = {name: place for place, name in enumerate(self.models)}
        return torch.tensor([places[str(g.prompt.columns[self.column])] for g in groups], dtype=torch.long)


class Share(NamedTuple):
    """Groups that are compared with the same frozen model."""

    name: str | None
    """The name that prompts have for the model; None where there is one for all."""
    reference: Policy | None
    groups: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """An algorithm and the models that it learns with; made only if they fit each other."""

    algorithm: Algorithm
    """Where numbers follow the run, that of a step differs from it in these numbers, and not in its form."""
    policy: Policy
    reference: Policy | None = None
    """The frozen model that the policy is compared with."""
    references: References | None = None
    """In place of `reference`: several, of which each prompt names one."""
    iterate: Policy | None = None
    """The policy of the last iteration, frozen; it may be the reference too."""
    critic: Critic | None = None
    perception: MaskedPasses | None = None
    """The policy's passes over masked images, for an algorithm with a perception term."""

    def __post_init__(self) -> None:
        algorithm = self.algorithm
        assert self.reference is None or self.references is None
        assert self.reference is not None or self.references is not None or not algorithm.needs_reference
        assert self.iterate is not None or not algorithm.needs_iterate
        assert (self.critic is None) == (algorithm.critic is None)
        assert (self.perception is None) == (algorithm.perception is None)

    def by_reference(self, packed: PackedGroups, groups: Sequence[int]) -> Iterator[Share]:
        """The numbers `groups` of groups of `packed`, by the model that they are compared with.

        Every rank gets the same models in the same order, which may be sharded over the ranks: a model that
        none of this rank's groups names has an empty share.
        """
        if self.references is None:
            yield Share(None, self.reference, list(groups))
            return
        assert packed.references is not None
        numbers = integers(packed.references)
        for number, (name, reference) in enumerate(self.references.models.items()):
            yield Share(name, reference, [g for g in groups if numbers[g] == number])
