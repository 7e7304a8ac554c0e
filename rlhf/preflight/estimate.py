"""Estimates of memory and of the time of a step on each rank, from the settings and the config.json.

    estimate(config, inputs, world_size=8, machine=Machine.measured(...))

Memory is the sum of what the run allocates; every part has a name and a setting that changes it. Time is the
number of operations or bytes, divided by the measured speed of a matrix product or of a copy on this machine.
A run does not reach these speeds, so the time is a lower bound. All sampled completions are assumed to have
`rollout.max_completion_tokens` tokens, those of a dataset their mean length.

Not included: fragmentation in the allocator, buffers of collectives, and of workers all but the models that
built-in reward functions and judges load.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rlhf.config.run import Config
from rlhf.inputs import Inputs
from rlhf.models.sharding import shard_ranks
from rlhf.models.sizes import model_sizes
from rlhf.preflight.machine import Machine
from rlhf.preflight.plan import GIB, Item, Plan, When
from rlhf.preflight.served_models import served_models


@dataclass(frozen=True, slots=True)
class Seconds:
    """Lower bounds of the seconds of one step on one rank."""

    rollout: float
    learn: float

    from_data: bool = False
    """Whether the completions are the dataset's, so that nothing is sampled."""

    @property
    def step(self) -> float:
        return self.rollout + self.learn


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimate for rank 0, which has the most to do where the prompts do not divide evenly."""

    memory: tuple[Item, ...]
    seconds: Seconds
    gathered: int
    """Bytes that a rank sends in a step to the ranks of its shard group: weights and gradients."""
    summed: int
    """Bytes that a rank sends in a step to the ranks with the same shard or whole model: gradients."""
    machine: Machine
    ranks: int
    uncounted: str | None
    """Memory that could not be estimated, as text; None where there is none."""

    @property
    def peak(self) -> int:
        """Bytes in the phase that needs the most."""
        return max(self.during("rollout"), self.during("learn"))

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine.memory

    def during(self, when: When) -> int:
        """Bytes in one phase."""
        return sum(item.bytes for item in self.memory if item.when in ("always", when))

    def lines(self) -> Iterator[str]:
        """The estimate as `rlhf check` prints it."""
        has, peak, where = self.machine.memory / GIB, self.peak / GIB, self.machine.device
        yield f"memory       {peak:.2f} GiB a rank at the fullest moment, of {has:.1f} ({where})"
        for item in sorted(self.memory, key=lambda item: -item.bytes):
            when = {"always": "", "rollout": "   (while sampling)", "learn": "   (while learning)"}[item.when]
            yield f"             {item.bytes / GIB:8.2f} GiB  {item.name}{when}"
        if self.uncounted is not None:
            yield f"             not counted: {self.uncounted}"
        if not self.fits:
            yield from self._too_much()
        seconds = self.seconds
        parts = f"sampling {_clock(seconds.rollout)}, learning {_clock(seconds.learn)}"
        how = "" if seconds.from_data else f" with completions of full length: {parts}"
        yield f"time         at least {_clock(seconds.step)} a step{how}"
        yield (
            f"             (from {self.machine.flops / 1e12:.3g} TFLOP/s in a matrix product and "
            f"{self.machine.bandwidth / 1e9:.3g} GB/s in a copy, measured here)"
        )
        if self.ranks > 1:
            sent = (self.gathered + self.summed) / 1e9
            yield f"network      each rank sends {sent:.3g} GB a step"

    def _too_much(self) -> Iterator[str]:
        when: When = "learn" if self.during("learn") >= self.during("rollout") else "rollout"
        over = self.peak - self.machine.memory
        yield f"WILL NOT FIT {over / GIB:.2f} GiB too much a rank; largest first:"
        taken = [item for item in self.memory if item.when in ("always", when) and item.bytes > over / 10]
        for item in sorted(taken, key=lambda item: -item.bytes):
            yield f"             {item.name}: {item.setting}"


def estimate(config: Config, inputs: Inputs, *, world_size: int, machine: Machine) -> Estimate:
    """The estimate of a run. Of each model only the config.json is read.

    Raises ModelError when a model cannot be read, ValueError when ranks do not divide into shard groups.
    """
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    shards = 1
    if config.distributed.mode == "sharded" and world_size > 1:
        shards = shard_ranks(config.distributed, world_size)
    critic = None
    if inputs.algorithm.critic is not None and config.critic.trunk == "own":
        critic = model_sizes(config.critic.path or config.model.path, dtype, head=False)
    policy = model_sizes(config.model.path, dtype)
    # a teacher, like any other reference, has a size of its own; one with two names is loaded once
    named = {path: name for name, path in config.model.references.items()}
    references = {name: model_sizes(path, dtype) for path, name in named.items()} or {"": policy}
    plan = Plan(config, inputs, policy, references, critic, world_size, shards)
    taken = Item(
        "in use already, by libraries or other processes", machine.taken, "always", "end other processes"
    )
    items = [taken, *plan.weights(), *plan.copies(), *plan.rollout(machine.on_cpu), *plan.activations()]
    items += served_models(inputs.rewards, on_cpu=machine.on_cpu)
    uncounted = None
    if plan.policy.kept_bytes is None:
        uncounted = (
            f"activations: for {inputs.model.model_type} they are known only once its weights are loaded"
        )
    return Estimate(
        memory=tuple(item for item in items if item.bytes),
        seconds=Seconds(
            plan.seconds_of_rollout(machine), plan.seconds_of_learning(machine), from_data=not plan.samples
        ),
        gathered=plan.gathered(),
        summed=plan.summed(),
        machine=machine,
        ranks=world_size,
        uncounted=uncounted,
    )


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
