"""The reference's log-probs of a dataset's completions, computed once; then the reference is given up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoints.stateful import CheckpointError, Stateful, TensorFiles
from rlhf.distributed.world import World
from rlhf.learn.experience import pack_groups
from rlhf.models.policy import Policy
from rlhf.torch_typed import pieces
from rlhf.types import Group, PackedGroups

Score = Callable[[Policy, PackedGroups], Tensor]
"""The log-probs `[N]` of packed groups under a model."""


class PrecomputedReference(Stateful):
    """Computes log-probs before the first step, each rank a share, and keeps them in checkpoints."""

    def __init__(self, reference: Policy, groups: Sequence[Group], score: Score, world: World) -> None:
        """`groups`: all of the dataset, in the order of the file."""
        self.reference, self.groups, self.score, self.world = reference, groups, score, world
        self._logprobs: Tensor | None = None
        self._places: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}

    def prepare(self) -> str:
        """Computes what no checkpoint has brought back, and gives the reference up."""
        done = self._logprobs is not None
        if not done:
            mine = self.groups[self.world.rank :: self.world.size]
            packed = pack_groups(mine, device=self.world.device)
            found = self.score(self.reference, packed).cpu()
            own = pieces(found, [_tokens(g) for g in mine])
            parts = self.world.gather(own)
            ranks = self.world.size
            ordered = [parts[i % ranks][i // ranks] for i in range(len(self.groups))]
            self._set(torch.cat([found[:0], *ordered]))
        self.reference.give_up()
        count = sum(len(g.trajectories) for g in self.groups)
        whence = "read from the checkpoint" if done else "computed"
        return f"reference: log-probs of {count} completions {whence}; the model is given up"

    def _set(self, logprobs: Tensor) -> None:
        self._logprobs, start = logprobs, 0
        for group in self.groups:
            for trajectory in group.trajectories:
                end = start + len(trajectory.token_ids)
                self._places[group.prompt.id, trajectory.token_ids] = (start, end)
                start = end

    def logprobs(self, groups: Sequence[Group]) -> Tensor:
        """fp32 `[N]`, of groups of the dataset as they are packed, or of some of their trajectories."""
        assert self._logprobs is not None, "before prepare()"
        places = [self._places[g.prompt.id, t.token_ids] for g in groups for t in g.trajectories]
        found = [self._logprobs[start:end] for start, end in places]
        return torch.cat([self._logprobs[:0], *found]).to(self.world.device)

    def state(self) -> dict[str, Any]:
        return {"computed": self._logprobs is not None}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {} if self._logprobs is None else {"reference": {"logprobs": self._logprobs}}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        if not state["computed"]:
            return
        logprobs, expected = tensors["reference"]["logprobs"], sum(map(_tokens, self.groups))
        if len(logprobs) != expected:
            raise CheckpointError(
                f"the checkpoint has the reference's log-probs of {len(logprobs)} tokens, but data.train has "
                f"{expected}: the data was changed; put it back as it was, or begin a new run"
            )
        self._set(logprobs)


def _tokens(group: Group) -> int:
    return sum(len(t.token_ids) for t in group.trajectories)
