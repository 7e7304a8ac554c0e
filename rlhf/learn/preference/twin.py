"""Twin: a fast and a slow LoRA adapter on one model learn together (OFS-DPO, algos/preference/chase.py).

The fast one is the policy: it is sampled from, evaluated, saved as `policy` and exported. Each adapter has an
optimizer with the learning rate that it began with. Every `interval` steps the adapter whose mean loss of
pairs was lower becomes the fast one, and takes its optimizer with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.algos.algorithm import Algorithm
from rlhf.algos.preference.chase import Chase
from rlhf.algos.preference.losses import margins
from rlhf.checkpoints.stateful import Stateful, TensorFiles
from rlhf.config.learner import LearnerConfig
from rlhf.distributed.world import World
from rlhf.learn.optimizer import MasterAdamW, step_together
from rlhf.metrics import Mean, Metrics, Sum
from rlhf.models.policy import Policy
from rlhf.tensors.contrasts import Rival
from rlhf.torch_typed import numbers
from rlhf.types import LossInputs


class Twin(Stateful):
    """The slow adapter beside the policy's own, which is the fast one."""

    def __init__(
        self,
        policy: Policy,
        fast: MasterAdamW,
        chase: Chase,
        world: World,
        section: LearnerConfig,
        total_steps: int,
    ) -> None:
        """The slow adapter begins as a copy of the policy's. `fast`: the optimizer of the policy."""
        assert policy.adapter is not None, "two adapters of one model learn"
        self.adapter, self.fast, self.chase, self.world = policy.adapter, fast, chase, world
        dtype = next(iter(fast.masters.values())).weight.dtype
        self.weights = {name: nn.Parameter(master.value().clone()) for name, master in fast.masters.items()}
        """A and B of the slow adapter."""
        with self.slow():
            self.optimizer = MasterAdamW(policy.model, dtype, section, total_steps)
        self.optimizer.lr_scale = chase.lr_ratio
        self._losses = [0.0, 0.0]
        """Sums of the losses of pairs of fast and slow, over all ranks and the steps of the interval."""
        self._new = [0.0, 0.0]
        """The same of this rank and the present step."""

    def slow(self) -> AbstractContextManager[None]:
        """Within this context the policy computes with the slow adapter."""
        return self.adapter.holding(self.weights)

    def accumulate(self, algorithm: Algorithm, forward: Callable[[], tuple[Tensor, LossInputs]]) -> Metrics:
        """Adds the gradients of both adapters up for one microbatch.

        `forward` makes a forward pass: hidden states, which are not used here, and what a loss sees.
        Three passes, in the memory of one. Each forward is in the same context as its backward: with
        checkpointed activations the backward makes the forward again, with the adapter that is there then.
        """
        preference = algorithm.preference
        assert preference is not None
        with torch.no_grad(), self.slow():
            slow_margin = margins(forward()[1], preference)
        _, batch = forward()
        fast_margin = margins(batch, preference).detach()
        fast = algorithm.loss(replace(batch, rival=Rival(slow_margin, is_slow=True)))
        torch.autograd.backward(fast.loss)
        with self.slow():
            slow = algorithm.loss(replace(forward()[1], rival=Rival(fast_margin, is_slow=False)))
            torch.autograd.backward(slow.loss)
        return self._observe(fast.metrics, slow.metrics)

    def _observe(self, fast: Metrics, slow: Metrics) -> Metrics:
        """The metrics of the fast adapter, and a few of the slow one."""
        for i, metrics in enumerate((fast, slow)):
            loss = metrics.get("pairs/loss")
            if isinstance(loss, Mean):
                self._new[i] += loss.total
        names = {"pairs/loss": "twin/slow_loss", "pairs/margin": "twin/slow_margin"}
        return fast | {names[key]: value for key, value in slow.items() if key in names}

    def step(self, step: int) -> Metrics:
        """One update of the slow adapter, with a norm of its own."""
        metrics = step_together({"twin/slow_lr": (self.optimizer, step)}, self.world)
        names = {"grad_norm": "twin/slow_grad_norm"}
        return {names.get(name, name): value for name, value in metrics.items()}

    def after(self, steps_done: int) -> Metrics:
        """Ends a step: at the end of an interval the adapter with the lower loss becomes the fast one.

        Every rank calls it.
        """
        new = self.world.all_sum(torch.tensor(self._new, device=self.world.device))
        self._losses = [a + b for a, b in zip(self._losses, numbers(new), strict=True)]
        self._new = [0.0, 0.0]
        swaps = False
        if steps_done % self.chase.interval == 0:
            swaps = self._losses[1] < self._losses[0]
            self._losses = [0.0, 0.0]
        if swaps:
            self._swap()
        return {"twin/swaps": Sum(float(swaps))}

    def _swap(self) -> None:
        fast, slow = self.fast, self.optimizer
        fast.masters, slow.masters = slow.masters, fast.masters
        fast.lr_scale, slow.lr_scale = slow.lr_scale, fast.lr_scale
        self.weights = self.adapter.exchange(self.weights)

    def state(self) -> dict[str, Any]:
        return {"losses": self._losses, "new": self._new, "swapped": self.fast.lr_scale < 1.0}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return self.optimizer.tensors()

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self._losses, self._new = list(state["losses"]), list(state["new"])
        if state["swapped"]:
            self.fast.lr_scale, self.optimizer.lr_scale = self.optimizer.lr_scale, self.fast.lr_scale
        self.optimizer.load(state, tensors)
