"""What a run will take on each rank, before it starts: memory, and the time of a step.

    estimate(config, inputs, world_size=8, machine=Machine.measured(...))

Memory is added up from what the run allocates; every part has a name and the setting that changes it. Time is
work divided by rates measured on this machine, a matrix product's and a copy's: a run reaches a part of these
rates, so the time is a lower bound. Completions are taken to be as long as they may be.

What is left out: the allocator's fragments, reward workers, buffers of collectives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from rlhf.config.run import Config
from rlhf.models.sharding import shard_ranks
from rlhf.models.sizes import ModelSizes, model_sizes
from rlhf.preflight.machine import Machine

if TYPE_CHECKING:
    from rlhf.inputs import Inputs

GIB = 2**30
WORKSPACE = 512 << 20
"""What the log-probs may take beside the hidden states (kernels/token_stats)."""
When = Literal["always", "rollout", "learn"]


@dataclass(frozen=True, slots=True)
class Item:
    """A part of a rank's memory."""

    name: str
    bytes: int
    when: When
    """Rollouts and updates take turns: what one needs is free in the other."""
    setting: str
    """What to change when it is too much."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Lower bounds for one step on one rank."""

    rollout: float
    learn: float

    @property
    def step(self) -> float:
        return self.rollout + self.learn


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one rank; the first one has the most to do where prompts do not divide evenly."""

    memory: tuple[Item, ...]
    seconds: Seconds
    gathered: int
    """Bytes that a rank sends in a step to those that share a model with it: weights, gradients of rows."""
    summed: int
    """Bytes that it sends to those that hold the same rows, or the same model: gradients."""
    machine: Machine
    ranks: int
    uncounted: str | None

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return max(self.during("rollout"), self.during("learn"))

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine.memory

    def during(self, when: When) -> int:
        return sum(item.bytes for item in self.memory if item.when in ("always", when))

    def lines(self) -> Iterator[str]:
        """For people, as `rlhf check` prints them."""
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
        yield (
            f"time         at least {_clock(seconds.step)} a step with completions of full length: sampling "
            f"{_clock(seconds.rollout)}, learning {_clock(seconds.learn)}"
        )
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
    """Reads the config.json of each model and nothing else.

    Raises ModelError, or ValueError: the ranks cannot be grouped as asked.
    """
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    cut = 1
    if config.distributed.mode == "sharded" and world_size > 1:
        cut = shard_ranks(config.distributed, world_size)
    critic = None
    if inputs.algorithm.critic is not None and config.critic.trunk == "own":
        critic = model_sizes(config.critic.path or config.model.path, dtype, head=False)
    plan = _Plan(config, inputs, model_sizes(config.model.path, dtype), critic, world_size, cut)
    taken = Item("in use already: libraries and others", machine.taken, "always", "free it")
    items = [taken, *plan.weights(), *plan.copies(), *plan.rollout(machine.on_cpu), *plan.activations()]
    uncounted = None
    if plan.policy.kept_bytes is None:
        uncounted = f"activations, which the code of {inputs.model.model_type} shows with its weights only"
    return Estimate(
        memory=tuple(item for item in items if item.bytes),
        seconds=Seconds(plan.seconds_of_rollout(machine), plan.seconds_of_learning(machine)),
        gathered=plan.gathered(),
        summed=plan.summed(),
        machine=machine,
        ranks=world_size,
        uncounted=uncounted,
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the first rank has to do in a step, completions at full length."""

    config: Config
    inputs: Inputs
    policy: ModelSizes
    critic: ModelSizes | None
    ranks: int
    cut: int
    """Over how many ranks a model is cut; 1: each has all of it."""

    @property
    def width(self) -> int:
        """Bytes of a weight in the type that is computed with."""
        return 2 if self.config.model.dtype == "bfloat16" else 4

    @property
    def prompts(self) -> int:
        return -(-self.config.rollout.prompts_per_step // self.ranks)

    @property
    def rows(self) -> int:
        return self.prompts * self.config.rollout.group_size

    @property
    def prompt_tokens(self) -> float:
        prompts = self.inputs.train.prompts
        return sum(len(p.token_ids) for p in prompts) / len(prompts)

    @property
    def completion_tokens(self) -> int:
        return self.config.rollout.max_completion_tokens

    @property
    def packed_tokens(self) -> float:
        """Of all groups, a prompt once a group where it is shared."""
        shared = self.config.model.packing in ("auto", "shared_prefix")
        prompts = self.prompts if shared else self.rows
        return prompts * self.prompt_tokens + self.rows * self.completion_tokens

    @property
    def microbatch_tokens(self) -> float:
        section = self.config.learner
        return min(section.microbatch_tokens, self.packed_tokens / section.minibatches)

    @property
    def learned(self) -> list[tuple[str, ModelSizes, int]]:
        """Name, model and number of weights of each part that has an optimizer."""
        lora = self.config.model.lora
        own = self.policy.weights if lora is None else lora.rank * self.policy.linear_sides
        parts = [("policy" if lora is None else "adapter", self.policy, own)]
        return parts if self.critic is None else [*parts, ("critic", self.critic, self.critic.weights)]

    def weights(self) -> Iterator[Item]:
        """Masters, with the weights that are half of them, moments and gradients."""
        more = "model.lora, or distributed.mode=sharded on more ranks"
        for name, _, count in self.learned:
            own = -(-count // self.cut)
            yield Item(f"{name}: float32 weights and AdamW's moments", own * 12, "always", more)
            yield Item(f"{name}: gradients", own * 4, "learn", more)

    def copies(self) -> Iterator[Item]:
        """Weights that are computed with, where they are no part of a master."""
        width, lora = self.width, self.config.model.lora
        smaller = "a smaller model, or model.dtype=bfloat16"
        for name, sizes, _ in self.learned:
            if self.cut > 1:
                gathered = (2 * sizes.largest_layer + sizes.outside_layers) * width
                yield Item(f"{name}: layers while they are gathered", gathered, "learn", smaller)
            elif name == "adapter":
                text = f"policy: weights in {self.config.model.dtype}"
                yield Item(text, sizes.weights * width, "always", smaller)
        held = int(self.cut > 1 and not self.config.rollout.elsewhere)
        copies = held + int(self.config.rollout.engine == "vllm")
        text, less = "policy: whole, for the engine in this process", f"rollout.engine=vllm-server, {smaller}"
        yield Item(text, copies * self.policy.weights * width, "always", less)
        if lora is not None:
            merged = self.policy.matrices * width
            yield Item("adapted weights, merged for the engine", merged, "always", "model.lora.targets")
        switched_off = lora is not None and self.config.model.reference is None
        if self.inputs.algorithm.needs_reference and not switched_off:
            own = -(-self.policy.weights // self.cut) * width
            yield Item("reference", own, "always", "algorithm.kl.coef=0, or model.lora")

    def rollout(self, on_cpu: bool) -> Iterator[Item]:
        section = self.config.rollout
        reserved, fewer = int(section.kv_cache_gib * GIB), "rollout.kv_cache_gib: groups beyond it wait"
        if section.engine == "vllm":
            yield Item("keys and values, which vLLM reserves", reserved, "always", fewer)
        if section.engine.startswith("vllm"):
            return
        yield Item("keys and values", min(self._keys_and_values(), reserved), "rollout", fewer)
        row = self.policy.vocabulary * 4
        yield Item("logits of the tokens being sampled", self.rows * row // self._waves(), "rollout", fewer)
        if on_cpu and self.width == 2:
            packed = (self.policy.matrices + self.policy.head) * 2
            yield Item("linear layers, laid out for sampling", packed, "rollout", "rollout.engine=hf")

    def activations(self) -> Iterator[Item]:
        lower = "learner.microbatch_tokens"
        if not self.config.model.gradient_checkpointing:
            lower += ", or model.gradient_checkpointing=true"
        tokens = self.microbatch_tokens
        own = [("policy", self.policy)] + ([] if self.critic is None else [("critic", self.critic)])
        for name, sizes in own:
            kept = sizes.kept_bytes or 0
            if self.config.model.gradient_checkpointing:
                kept = sizes.layers * sizes.hidden * self.width + kept // sizes.layers
            text = f"{name}: activations of {tokens:.0f} tokens"
            yield Item(text, int(tokens * kept), "learn", lower)
        rows = tokens * self.rows * self.completion_tokens / self.packed_tokens
        logits = min(WORKSPACE, int(rows * self.policy.vocabulary * 4))
        yield Item("logits, in tiles", logits, "learn", "nothing: it is bounded")

    def _keys_and_values(self) -> int:
        tokens = self.prompts * self.prompt_tokens + self.rows * self.completion_tokens
        return int(tokens * self.policy.key_value_bytes)

    def _waves(self) -> int:
        """How often the engine fills its keys and values anew."""
        return max(1, -(-self._keys_and_values() // int(self.config.rollout.kv_cache_gib * GIB)))

    def _forward(self, sizes: ModelSizes) -> float:
        """Floating-point operations of the transformer over all groups: 2 a weight and token, and 4 for each
        pair of tokens of which one attends to the other."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        pairs = self.prompts * prompt**2 / 2 + self.rows * completion * (prompt + completion / 2)
        return 2 * sizes.matrices * self.packed_tokens + 4 * sizes.attended * pairs

    def _head(self) -> float:
        return 2 * self.policy.head * self.rows * self.completion_tokens

    @property
    def _passes_before(self) -> int:
        """Of the policy or its reference, without gradient."""
        section, algorithm = self.config.learner, self.inputs.algorithm
        in_reward = algorithm.kl.coef > 0 and algorithm.kl.placement == "reward"
        old = section.epochs * section.minibatches > 1 or in_reward
        return int(old) + (section.epochs if algorithm.needs_exact_kl else int(algorithm.needs_reference))

    def seconds_of_rollout(self, machine: Machine) -> float:
        """Every token reads all weights once for all rows that are decoded together."""
        sizes, waves = self.policy, self._waves()
        prefill = 2 * sizes.matrices * self.prompts * self.prompt_tokens / machine.flops
        multiplied = sizes.matrices + sizes.head
        read = multiplied * self.width + self._keys_and_values() / waves / 2
        compute = 2 * multiplied * self.rows / waves
        step = max(read / machine.bandwidth, compute / machine.flops)
        return prefill + waves * self.completion_tokens * step

    def seconds_of_learning(self, machine: Machine) -> float:
        """A backward pass is two forward ones, one where the weights are frozen under an adapter."""
        section = self.config.learner
        again = int(self.config.model.gradient_checkpointing)
        own = self._forward(self.policy)
        back = 2 if self.config.model.lora is None else 1
        work = section.epochs * ((1 + again + back) * own + 3 * self._head())
        work += self._passes_before * (own + self._head())
        if self.critic is not None:
            work += (section.epochs * (3 + again) + 1) * self._forward(self.critic)
        # AdamW reads weight, gradient and both moments, and writes all but the gradient
        touched = self._updates * sum(count for _, _, count in self.learned) / self.cut * 28
        return work / machine.flops + touched / machine.bandwidth

    @property
    def _updates(self) -> int:
        return self.config.learner.epochs * self.config.learner.minibatches

    def summed(self) -> int:
        """A ring adds up by passing (n-1)/n of the float32 gradients on twice."""
        groups = self.ranks // self.cut
        learned = sum(count for _, _, count in self.learned)
        return int(self._updates * 4 * learned / self.cut * 2 * (groups - 1) / groups)

    def gathered(self) -> int:
        """A ring passes (n-1)/n on: of the weights for every pass and for the engine, of the gradients."""
        if self.cut == 1:
            return 0
        part = (self.cut - 1) / self.cut
        micros = math.ceil(self.packed_tokens / self.config.learner.minibatches / self.microbatch_tokens)
        passes = micros * (2 * self._updates + self.config.learner.minibatches * self._passes_before)
        learned = sum(count for _, _, count in self.learned)
        each = learned * (passes * self.width + self._updates * micros * 4)
        return int(part * (each + self.policy.weights * self.width))


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
