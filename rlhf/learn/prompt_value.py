"""V(prompt), the expected reward of a prompt's completions: fitted once, before the first step (A-LoL).

V is a small head on the frozen reference's hidden states of the prompt: one learned query attends to them,
and a linear layer and a sigmoid make a number of 0 to `max_value`. It is fitted to one reward a prompt: that
of a greedy completion of the reference, or the mean reward that the data has for the prompt.

Differences from A-LoL's code (arXiv:2305.14718, its `ValueHeadAttention`): 1. padding is masked out of the
attention; 2. the prompts are those of the training set (at most `max_prompts` of them), not of a development
set, and their completions in the data are not used; 3. the values are computed once, for every prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rlhf.checkpoints.stateful import Stateful, TensorFiles
from rlhf.config.data import PromptValueConfig
from rlhf.data.order import order
from rlhf.distributed.world import World, derive_seed
from rlhf.models.packing import pack
from rlhf.models.policy import Policy
from rlhf.torch_typed import numbers, pieces, seeded
from rlhf.types import Prompt

HEADS = 8
DROPOUT = 0.1
BATCH = 16
BAD_FIT = 1.2
"""A warning says that the values are bad where their squared error is this many times that of a constant."""

log = logging.getLogger(__name__)

Targets = Callable[[Sequence[Prompt]], list[float | None]]
"""One reward for each prompt; None where there is none."""

Loss = Callable[[Tensor, list[int]], Tensor]
"""The head's outputs for some prompts `[P]`, and the places of those among all -> their losses `[P]`."""


class ValueHead(nn.Module):
    """States of a prompt -> its value: dropout, attention with one learned query, linear, sigmoid."""

    def __init__(self, dim: int, *, max_value: float) -> None:
        super().__init__()
        heads = next(h for h in range(HEADS, 0, -1) if dim % h == 0)
        self.max_value = max_value
        self.dropout = nn.Dropout(DROPOUT)
        self.query = nn.Parameter(torch.randn(1, 1, dim) / dim**0.5)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.linear = nn.Linear(dim, 1)

    def forward(self, states: Float[Tensor, "P T H"], mask: Bool[Tensor, "P T"]) -> Float[Tensor, " P"]:
        """`mask` is True on the tokens of each prompt; values elsewhere, even NaN, have no effect."""
        states = self.dropout(states.masked_fill(~mask[..., None], 0.0))
        query = self.query.expand(len(states), 1, -1)
        pooled, _ = self.attention(query, states, states, key_padding_mask=~mask, need_weights=False)
        return self.linear(pooled)[:, 0, 0].sigmoid() * self.max_value


@torch.no_grad()
def prompt_states(policy: Policy, prompts: Sequence[Prompt]) -> list[Tensor]:
    """The last layer's hidden states of each prompt's tokens, `[T, H]` in float32."""
    device = policy.head.module.weight.device
    ids = [torch.tensor(p.token_ids, device=device) for p in prompts]
    # a prompt as the completion of its own first token: the row that predicts token t + 1 is that of token t
    packed = pack([i[:1] for i in ids], [[torch.cat([i[1:], i[:1]])] for i in ids])
    return pieces(policy.hidden(packed).float(), [len(i) for i in ids])


def padded_states(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """States `[P, T, H]`, padded with zeros behind each prompt, and a mask `[P, T]` of the tokens."""
    lengths = torch.tensor([len(s) for s in states], device=states[0].device)
    padded = nn.utils.rnn.pad_sequence(list(states), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


def fit(
    head: ValueHead, states: Sequence[Tensor], loss: Loss, section: PromptValueConfig, seed: int
) -> float:
    """Fits the head with Adam on the mean of `loss`; returns the lowest mean of an epoch.

    The head keeps the weights that it had after that epoch.
    """
    adam = _adam(head, section.lr)
    best, best_state = float("inf"), {k: v.clone() for k, v in head.state_dict().items()}
    # only dropout draws random numbers here; the seed makes them the same whatever was drawn before
    with seeded(seed, states[0].device):
        for epoch in range(section.epochs):
            total = 0.0
            head.train()
            places = order(seed, len(states), epoch * len(states), len(states))
            for first in range(0, len(places), BATCH):
                some = places[first : first + BATCH]
                losses = loss(head(*padded_states([states[i] for i in some])), some)
                adam.zero_grad()
                torch.autograd.backward(losses.mean())
                adam.step()
                total += float(losses.detach().sum())
            if total / len(states) < best:
                best, best_state = total / len(states), {k: v.clone() for k, v in head.state_dict().items()}
    head.load_state_dict(best_state)
    head.eval()
    return best


def _adam(head: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(head.parameters(), lr=lr)


class PromptNumbers(Stateful):
    """A number for every prompt of a run, `values[prompt.id]`: filled by `prepare`, never changed again."""

    what: str

    def __init__(
        self,
        section: PromptValueConfig,
        policy: Policy,
        prompts: Sequence[Prompt],
        world: World,
        *,
        seed: int,
    ) -> None:
        """`policy`: the frozen reference, or the policy before its first update, which is the same."""
        self.section, self.policy, self.prompts = section, policy, prompts
        self.world, self.seed = world, derive_seed(seed, self.what)
        self.values: dict[str, float] = {}

    def prepare(self) -> str:
        """Fits a head and computes all numbers; returns a line that says how well it fits.

        Numbers that were loaded from a checkpoint stay, because the policy may have changed since.
        """
        if self.values:
            return f"{self.what}s of {len(self.values)} prompts are those of the checkpoint"
        return self._learn()

    def _learn(self) -> str:
        raise NotImplementedError

    def _fit(self, prompts: Sequence[Prompt], loss: Loss, *, max_value: float) -> float:
        """Fits a head on `prompts` and fills `values` with its outputs for all prompts; the mean loss."""
        with seeded(self.seed):
            head = ValueHead(self.policy.head.module.in_features, max_value=max_value)
        device = self.policy.head.module.weight.device
        batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
        states = [s for batch in batches for s in prompt_states(self.policy, batch)]
        result = fit(head.to(device), states, loss, self.section, self.seed)
        # those of rank 0 on every rank: other devices may round differently
        self.values.update(self.world.gather(self._values_by(head))[0])
        return result

    @torch.no_grad()
    def _values_by(self, head: ValueHead) -> dict[str, float]:
        values: dict[str, float] = {}
        for first in range(0, len(self.prompts), BATCH):
            some = self.prompts[first : first + BATCH]
            found = head(*padded_states(prompt_states(self.policy, some)))
            values |= dict(zip([p.id for p in some], numbers(found), strict=True))
        return values

    def _some(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """At most `max_prompts` of the prompts, drawn by the seed."""
        count = min(len(prompts), self.section.max_prompts)
        return [prompts[i] for i in order(self.seed, len(prompts), 0, count)]

    def state(self) -> dict[str, Any]:
        return {"values": self.values}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.values.update(state["values"])


class PromptValues(PromptNumbers):
    """V(prompt), fitted to `targets` with the squared error."""

    what = "value"

    def __init__(
        self,
        section: PromptValueConfig,
        policy: Policy,
        prompts: Sequence[Prompt],
        targets: Targets,
        world: World,
        *,
        seed: int,
    ) -> None:
        super().__init__(section, policy, prompts, world, seed=seed)
        self.targets = targets

    def _learn(self) -> str:
        """Fits the head. Raises ValueError for targets out of range, or where there is none."""
        chosen = self._some(self.prompts)
        found = [(p, t) for p, t in zip(chosen, self.targets(chosen), strict=True) if t is not None]
        if not found:
            raise ValueError("no prompt has a reward to learn its value from")
        rewards, largest = [t for _, t in found], self.section.max_value
        if min(rewards) < 0 or max(rewards) > largest:
            raise ValueError(
                f"values of prompts lie between 0 and prompt_value.max_value = {largest:g}, but rewards go "
                f"from {min(rewards):g} to {max(rewards):g}; raise it, or shift the rewards"
            )
        wanted = torch.tensor(rewards, device=self.policy.head.module.weight.device)

        def squared_error(values: Tensor, places: list[int]) -> Tensor:
            return (values - wanted[places]).square()

        error = self._fit([p for p, _ in found], squared_error, max_value=largest)
        constant = float(wanted.var(correction=0))
        values = self.values.values()
        if error > BAD_FIT * constant:
            log.warning(
                "values of prompts are further from the rewards they were learned from than their mean is "
                "(squared error %.4f, of the mean %.4f): lower prompt_value.lr, which is %g",
                error,
                constant,
                self.section.lr,
            )
        return (
            f"values of {len(values)} prompts, {min(values):.3f} to {max(values):.3f}, learned from "
            f"{len(found)} rewards with mean {sum(rewards) / len(rewards):.3f}: squared error {error:.4f}, "
            f"of a constant {constant:.4f}"
        )
