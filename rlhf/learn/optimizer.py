"""AdamW on float32 master weights: gradients over the ranks, clipping, the schedule, what is saved.

A bfloat16 weight has 8 bits: at a learning rate of 1e-6 nearly every update would be rounded away. So the
optimizer owns float32 masters (`learn/master_weights.py`) and adds up the gradients of all microbatches in
float32. The model's weights, which the engine samples from as well, are the masters rounded to bfloat16; in a
model that computes in float32, weights and masters are the same tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.checkpoints.stateful import CheckpointError, Stateful, TensorFiles
from rlhf.checkpoints.tensor_files import rows_like
from rlhf.config.learner import LearnerConfig
from rlhf.distributed.shards import is_sharded, replicas_of
from rlhf.distributed.world import World
from rlhf.learn.master_weights import Master
from rlhf.metrics import Max, Mean, Metrics, Sum

OTHERWISE = "go on with the model of that run, or begin a new run in another run_dir"


class MasterAdamW(Stateful):
    """Casts `model` (given in float32) to `dtype`, keeps masters of what learns, and updates both."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, section: LearnerConfig, total_steps: int
    ) -> None:
        self.section, self.total_steps = section, total_steps
        self.begins = 0
        """The step of the first update, at which the schedule begins."""
        self.lr_scale = 1.0
        """Factor of the learning rate."""
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        self.masters = {name: Master(weight, dtype) for name, weight in named}
        for parameter in model.parameters():
            if not is_sharded(parameter):
                parameter.data = parameter.data.to(dtype)

    def step(self, step: int, world: World) -> Metrics:
        """One update from the gradients accumulated on every rank; they are gone afterwards.

        Gradients are added over the ranks (losses are already divided by global counts) and clipped by their
        global norm. An update with a non-finite gradient is skipped and counted.
        """
        return step_together({"lr": (self, step)}, world)

    def lr(self, step: int) -> float:
        """Learning rate in force at a step; steps count from 0."""
        return (
            self.lr_scale
            * self.section.lr
            * lr_factor(step - self.begins, self.section, self.total_steps - self.begins)
        )

    def gather(self, world: World) -> Tensor:
        """Adds the gradients up over the ranks and returns their norm, a scalar.

        FSDP has already added up the gradients of sharded weights.
        """
        for master in self.masters.values():
            master.collect()
        whole = [master for master in self.masters.values() if not master.is_sharded]
        if world.size > 1:
            world.sum_gradients([master.widened() for master in whole])
        norm = _norm(whole)
        sharded = [master for master in self.masters.values() if master.is_sharded]
        if not sharded:
            return norm
        # every row lies on as many ranks as there are replicas, so the sum counts it that often
        squares = world.all_sum(_norm(sharded).square()) / replicas_of(sharded[0].weight)
        return (norm.square() + squares).sqrt()

    def apply(self, step: int, norm: Tensor) -> bool:
        """Clips the gathered gradients, with `norm` for their norm, and updates; returns whether it did.

        There is no update if `norm` is not finite.
        """
        finite = math.isfinite(norm.item())
        factor = (self.section.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for master in self.masters.values():
            if finite:
                master.update(factor, self.lr(step), self.section)
            master.gradient = None
        return finite

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint saves: the masters, and the moments and the number of updates of each."""
        masters: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            masters[name], own = master.saved()
            moments |= {f"{name}/{key}": value for key, value in own.items()}
        return {"model": masters, "optimizer": moments}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        """Inverse of `tensors`. Raises CheckpointError when names or shapes are those of another model."""
        saved, moments = tensors["model"], tensors["optimizer"]
        assert_names(set(saved), set(self.masters))
        for name, master in self.masters.items():
            value = rows_like(saved, name, master.weight)
            assert_shape(name, value.shape, master.shape)
            master.set(value)
            if f"{name}/step" not in moments:
                # earlier versions made moments with the first update; this was saved before it
                continue
            master.moments.step.copy_(moments[f"{name}/step"])
            master.moments.first.copy_(rows_like(moments, f"{name}/exp_avg", master.weight))
            master.moments.second.copy_(rows_like(moments, f"{name}/exp_avg_sq", master.weight))


def assert_names(saved: AbstractSet[str], own: AbstractSet[str]) -> None:
    """Raises CheckpointError: weights of a checkpoint, by name, are not those of the model."""
    if saved != own:
        odd = sorted(saved ^ own)[:3]
        raise CheckpointError(
            f"the checkpoint is of another model: {', '.join(odd)} is in one of the two only; {OTHERWISE}"
        )


def assert_shape(name: str, saved: torch.Size, own: torch.Size) -> None:
    """Raises CheckpointError: a weight of a checkpoint has another shape than the model's."""
    if saved != own:
        raise CheckpointError(
            f"the checkpoint is of another model: {name} is {list(saved)} in it and {list(own)} in the "
            f"model; {OTHERWISE}"
        )


def _norm(masters: Sequence[Master]) -> Tensor:
    """Norm of all their gradients together."""
    return nn.utils.get_total_norm([master.norm() for master in masters])


def step_together(optimizers: Mapping[str, tuple[MasterAdamW, int]], world: World) -> Metrics:
    """One update by several optimizers, clipped by one norm over all gradients; all of them update or none.

    `optimizers`: by the name under which its learning rate is reported, each with its own count of steps.
    """
    norms = [optimizer.gather(world) for optimizer, _ in optimizers.values()]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum().sqrt()
    # all optimizers are given the same norm: all find it finite, or none does
    updated = [optimizer.apply(step, norm) for optimizer, step in optimizers.values()]
    finite = all(updated)
    metrics: Metrics = {name: Max(optimizer.lr(step)) for name, (optimizer, step) in optimizers.items()}
    metrics["update/skipped"] = Sum(0.0 if finite else 1.0 / world.size)
    return metrics | ({"grad_norm": Mean(norm.item())} if finite else {})


def lr_factor(step: int, section: LearnerConfig, total_steps: int) -> float:
    """Linear warm-up over the first `warmup_steps`, then the schedule; `step` counts from 0.

    `linear` and `cosine` reach `final_lr_share` at `total_steps`, one step after the last update, as
    transformers' schedules do. `inverse_sqrt` is the schedule of PPO-max (arXiv:2307.04964, its code), with W
    for `warmup_steps`: max(step / W, 0.1) up to W, sqrt(W / step) from there on.
    """
    warmup = section.warmup_steps
    if section.schedule == "inverse_sqrt":
        rising, falling = max(step / max(1, warmup), 0.1), math.sqrt(max(1, warmup) / max(1, step, warmup))
        return rising if step < warmup else max(falling, 1e-8)
    if step < warmup:
        return (step + 1) / warmup
    progress, final = (step - warmup) / max(1, total_steps - warmup), section.final_lr_share
    match section.schedule:
        case "constant":
            return 1.0
        case "linear":
            return final + (1.0 - final) * (1.0 - progress)
        case "cosine":
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
