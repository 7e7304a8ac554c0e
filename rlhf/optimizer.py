"""AdamW on a float32 master copy; the model itself computes in bfloat16.

A bfloat16 weight has 8 bits: at a learning rate of 1e-6 nearly every update would be rounded away. So the
optimizer owns float32 masters, gradients of all microbatches are added up in float32, and after each update
the masters are copied into the model, which is the copy the engine samples from as well. In float32 model and
masters are one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.checkpoint import CheckpointError
from rlhf.config import LearnerConfig
from rlhf.distributed import World
from rlhf.metrics import Max, Mean, Metrics, Sum
from rlhf.sharding import as_shard, is_sharded, own_rows, replicas_of
from rlhf.state import Stateful
from rlhf.tensor_files import TensorFiles, rows_like
from rlhf.typed import after_gradient, copy_all


class MasterAdamW(Stateful):
    """Casts `model` (given in float32) to `dtype`, keeps its masters and updates both."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, section: LearnerConfig, total_steps: int
    ) -> None:
        self.section, self.total_steps = section, total_steps
        self.names: list[str] = []
        self.weights: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.names.append(name)
                self.weights.append(parameter)
        self.masters = [_master(weight, dtype) for weight in self.weights]
        for parameter in model.parameters():
            if not is_sharded(parameter):
                parameter.data = parameter.data.to(dtype)
        self._pairs = list(zip(self.weights, self.masters, strict=True))
        self._copied = [(w, m) for w, m in self._pairs if w is not m and not is_sharded(w)]
        self._first: dict[nn.Parameter, Tensor] = {}
        """The gradients of masters that came once, in the model's own type: they lose nothing in it."""
        for weight, master in self._copied:
            after_gradient(weight, partial(self._move_gradient, master))
        self.adamw: torch.optim.Optimizer = torch.optim.AdamW(
            self.masters,
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=True,
        )

    def step(self, step: int, world: World) -> Metrics:
        """One update from the gradients accumulated on every rank; they are gone afterwards.

        Gradients are added over the ranks (losses are already divided by global counts) and clipped by their
        global norm. An update with a non-finite gradient is skipped and counted.
        """
        return step_together({"lr": (self, step)}, world)

    def lr(self, step: int) -> float:
        """In force at a step, counted from 0."""
        return self.section.lr * lr_factor(step, self.section, self.total_steps)

    def gather(self, world: World) -> Tensor:
        """Adds the gradients up over the ranks; their norm. FSDP has added up those of sharded weights."""
        whole: list[Tensor] = []
        rows: list[Tensor] = []
        replicas = 1
        while self._first:
            master, gradient = self._first.popitem()
            master.grad = gradient.float()
        for weight, master in self._pairs:
            if is_sharded(weight):
                master.grad = None if weight.grad is None else own_rows(weight.grad)
                weight.grad, replicas = None, replicas_of(weight)
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            (rows if is_sharded(weight) else whole).append(master.grad)
        world.sum_gradients(whole)
        norm = nn.utils.get_total_norm(whole)
        if not rows:
            return norm
        # every row lies on as many ranks as there are replicas
        squares = world.all_sum(nn.utils.get_total_norm(rows).square()) / replicas
        return (norm.square() + squares).sqrt()

    def _move_gradient(self, master: nn.Parameter, weight: Tensor) -> None:
        """From the second microbatch on they are added up in float32."""
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        if master.grad is not None:
            master.grad.add_(gradient)
        elif master in self._first:
            master.grad = self._first.pop(master).float().add_(gradient)
        else:
            self._first[master] = gradient

    def apply(self, step: int, norm: Tensor) -> bool:
        """Clips the gathered gradients, as if `norm` were theirs, and updates unless it is not finite."""
        finite = math.isfinite(norm.item())
        if finite:
            nn.utils.clip_grads_with_norm_(self.masters, self.section.max_grad_norm, norm)
            for group in self.adamw.param_groups:
                group["lr"] = self.lr(step)
            self.adamw.step()
            self._copy_to_model()
        self.adamw.zero_grad(set_to_none=True)
        return finite

    @torch.no_grad()
    def _copy_to_model(self) -> None:
        if self._copied:
            copy_all([weight for weight, _ in self._copied], [master for _, master in self._copied])

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint needs: the masters, and the moments and update counts of each."""
        moments: dict[str, Tensor] = {}
        for name, (weight, master) in zip(self.names, self._pairs, strict=True):
            for key, value in self.adamw.state.get(master, {}).items():
                of_rows = is_sharded(weight) and key != "step"
                moments[f"{name}/{key}"] = as_shard(value, weight) if of_rows else value
        masters = {
            name: weight.detach() if is_sharded(weight) else master.detach()
            for name, (weight, master) in zip(self.names, self._pairs, strict=True)
        }
        return {"model": masters, "optimizer": moments}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        """Inverse of `tensors`. Raises CheckpointError when they are of another model."""
        masters, moments = tensors["model"], tensors["optimizer"]
        if set(masters) != set(self.names):
            odd = sorted(set(masters) ^ set(self.names))[:3]
            raise CheckpointError(
                f"the checkpoint is of another model: {', '.join(odd)} is in one of the two only"
            )
        for name, (weight, master) in zip(self.names, self._pairs, strict=True):
            saved = rows_like(masters, name, weight)
            if saved.shape != master.shape:
                raise CheckpointError(f"{name}: checkpoint {list(saved.shape)}, model {list(master.shape)}")
            master.copy_(saved)
            own: dict[str, Tensor] = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                full = f"{name}/{key}"
                if full in moments:
                    value = moments[full] if key == "step" else rows_like(moments, full, weight)
                    own[key] = value.clone()
            self.adamw.state[master] = own
        self._copy_to_model()


def _master(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """Of a sharded weight this rank's rows, which are float32; of another one a copy, unless it is computed
    with as it is."""
    if is_sharded(weight):
        return nn.Parameter(own_rows(weight))
    return weight if weight.dtype == dtype else nn.Parameter(weight.detach().clone())


def step_together(optimizers: Mapping[str, tuple[MasterAdamW, int]], world: World) -> Metrics:
    """One update of several parts, clipped by one norm over all; made of all of them or of none.

    By the name under which its learning rate is reported, each comes with its own count of steps.
    """
    norms = [optimizer.gather(world) for optimizer, _ in optimizers.values()]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum().sqrt()
    # the norm is one: all of them find it finite, or none does
    made = [optimizer.apply(step, norm) for optimizer, step in optimizers.values()]
    finite = all(made)
    metrics: Metrics = {name: Max(optimizer.lr(step)) for name, (optimizer, step) in optimizers.items()}
    metrics["update/skipped"] = Sum(0.0 if finite else 1.0 / world.size)
    return metrics | ({"grad_norm": Mean(norm.item())} if finite else {})


def lr_factor(step: int, section: LearnerConfig, total_steps: int) -> float:
    """Linear warm-up over the first `warmup_steps`, then the schedule; `step` counts from 0.

    `inverse_sqrt` is that of PPO-max (arXiv:2307.04964, its code): max(step / W, 0.1) up to W, sqrt(W / step)
    from there on.
    """
    warmup = section.warmup_steps
    if section.schedule == "inverse_sqrt":
        rising, falling = max(step / max(1, warmup), 0.1), math.sqrt(max(1, warmup) / max(1, step, warmup))
        return rising if step < warmup else max(falling, 1e-8)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    match section.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
