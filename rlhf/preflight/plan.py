"""What rank 0 does in a step, counted: tokens, operations, bytes, and what lies in memory when."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from rlhf.config.run import Config
from rlhf.inputs import Inputs
from rlhf.models.sizes import ModelSizes
from rlhf.preflight.machine import Machine
from rlhf.types import Source

GIB = 2**30
WORKSPACE = 512 << 20
"""Bytes of logits that the log-probs may hold at once (the tiles of kernels/token_stats)."""
When = Literal["always", "rollout", "learn"]


@dataclass(frozen=True, slots=True)
class Item:
    """One part of the memory of a rank."""

    name: str
    bytes: int
    when: When
    """The phase in which it is allocated: memory of rollouts is free during updates, and the reverse."""
    setting: str
    """The setting to change when it is too much."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What rank 0 does in a step, with completions of full length."""

    config: Config
    inputs: Inputs
    policy: ModelSizes
    references: Mapping[str, ModelSizes]
    """By the setting that names them, all that are loaded; without a setting it is the policy's start."""
    critic: ModelSizes | None
    ranks: int
    shards: int
    """The number of ranks over which a model is sharded; 1: each rank has all of it."""

    @property
    def width(self) -> int:
        """Bytes of a weight in `model.dtype`."""
        return 2 if self.config.model.dtype == "bfloat16" else 4

    @property
    def prompts(self) -> int:
        """Prompts of a step on this rank."""
        return -(-self.config.rollout.prompts_per_step // self.ranks)

    @property
    def samples(self) -> bool:
        """Whether the steps sample completions; with `data.mode: offline` the dataset has them."""
        return self.config.data.mode != "offline"

    @property
    def sampled(self) -> int:
        """Completions that are sampled in a step on this rank, by all samplers."""
        return self.prompts * self.config.rollout.group_size if self.samples else 0

    @property
    def rows(self) -> int:
        """Completions that are learned from in a step on this rank."""
        return math.ceil(self.prompts * self._rows_of_a_prompt)

    @property
    def _rows_of_a_prompt(self) -> float:
        config, algorithm, offline = self.config, self.inputs.algorithm, self.inputs.offline
        sampled: float = config.rollout.group_size
        if algorithm.selection.own_only:
            return sum(s.n for s in config.rollout.samplers if s.source == "policy") or sampled
        # whatever the rule compares, and what a further term of the loss takes besides
        compares_two = algorithm.preference is not None and config.pairs.rule not in ("all", "dno_prct")
        sizes = [] if offline is None else [len(g.trajectories) for g in offline.groups]
        if self.samples and config.data.mix:
            return (2.0 if compares_two else sum(sizes) / len(sizes)) + sampled
        if self.samples or not sizes or config.data.sampling != "groups":
            return min(sampled, 2.0) if compares_two else sampled
        return sum(min(n, 2) if compares_two else n for n in sizes) / len(sizes)

    @property
    def prompt_tokens(self) -> float:
        """Mean length of a prompt."""
        prompts = self.inputs.train.prompts
        return sum(len(p.token_ids) for p in prompts) / len(prompts)

    @property
    def completion_tokens(self) -> float:
        """Length of a completion: the limit for sampled ones, the mean for those of a dataset."""
        offline = self.inputs.offline
        if self.samples or offline is None:
            return self.config.rollout.max_completion_tokens
        lengths = [len(t.token_ids) for g in offline.groups for t in g.trajectories]
        return sum(lengths) / len(lengths)

    @property
    def packed_tokens(self) -> float:
        """Tokens of all groups of a step; a prompt counts once for each group where the packing shares it."""
        shared = self.config.model.packing in ("auto", "shared_prefix")
        prompts = self.prompts if shared else self.rows
        return prompts * self.prompt_tokens + self.rows * self.completion_tokens

    @property
    def microbatch_tokens(self) -> float:
        section = self.config.learner
        return min(section.microbatch_tokens, self.packed_tokens / section.minibatches)

    @property
    def learned(self) -> list[tuple[str, ModelSizes, int]]:
        """Name, model and number of trained weights of each part that has an optimizer."""
        lora = self.config.model.lora
        own = self.policy.weights if lora is None else lora.rank * self.policy.linear_sides
        parts = [("policy" if lora is None else "adapter", self.policy, own)]
        if self.inputs.algorithm.chase is not None:
            parts.append(("slow adapter", self.policy, own))
        return parts if self.critic is None else [*parts, ("critic", self.critic, self.critic.weights)]

    def weights(self) -> Iterator[Item]:
        """Float32 master weights (bfloat16 weights are half of their bits), AdamW's moments, gradients."""
        more = "model.lora, or distributed.mode=sharded on more ranks"
        for name, _, count in self.learned:
            own = -(-count // self.shards)
            yield Item(f"{name}: float32 weights and AdamW's moments", own * 12, "always", more)
            yield Item(f"{name}: gradients", own * 4, "learn", more)

    def copies(self) -> Iterator[Item]:
        """Weights in `model.dtype` beside the masters: gathered layers, the engine's copy, the reference."""
        width, lora = self.width, self.config.model.lora
        smaller = "a smaller model, or model.dtype=bfloat16"
        for name, sizes, _ in self.learned:
            if self.shards > 1:
                gathered = (2 * sizes.largest_layer + sizes.outside_layers) * width
                yield Item(f"{name}: layers while they are gathered", gathered, "learn", smaller)
            elif name == "adapter":
                text = f"policy: weights in {self.config.model.dtype}"
                yield Item(text, sizes.weights * width, "always", smaller)
        held = int(self.shards > 1 and not self.config.rollout.elsewhere)
        copies = held + int(self.config.rollout.engine == "vllm")
        text, less = (
            "policy: whole, for the engine in this process",
            f"rollout.engine=vllm-server, {smaller}",
        )
        yield Item(text, copies * self.policy.weights * width, "always", less)
        if lora is not None:
            merged = self.policy.matrices * width
            yield Item("adapted weights, merged for the engine", merged, "always", "model.lora.targets")
        switched_off = lora is not None and self.config.model.reference is None
        sampled = self.config.rollout.sources & {Source.REFERENCE, Source.MIXTURE}
        needed = self.inputs.algorithm.needs_reference or sampled
        moves = self.config.iteration.reference == "iterate"
        if needed and not (self.config.data.precompute_reference or switched_off or moves):
            less = "algorithm.kl.coef=0, or model.lora"
            if self.inputs.algorithm.preference is not None:
                less = "data.precompute_reference=true, or model.lora"
            if self.inputs.algorithm.has_teacher:
                less = "model.reference, a smaller teacher"
            for setting, sizes in self.references.items():
                own = -(-sizes.weights // self.shards) * width
                yield Item(setting.removeprefix("model.") or "reference", own, "always", less)
        if self.config.iteration.steps:
            # with an adapter its two factors, unless it is sampled from
            own = -(-self.policy.weights // self.shards) * width
            if lora is not None:
                sampled_from = Source.ITERATE in self.config.rollout.sources
                own = self.policy.matrices * width if sampled_from else self.learned[0][2] * width
            yield Item("iterate: the policy of the last iteration", own, "always", "iteration.steps=0")

    def rollout(self, on_cpu: bool) -> Iterator[Item]:
        section = self.config.rollout
        if not self.samples:
            return
        reserved, fewer = (
            int(section.kv_cache_gib * GIB),
            "rollout.kv_cache_gib (groups for which there is no room wait)",
        )
        if section.engine == "vllm":
            yield Item("keys and values, which vLLM reserves", reserved, "always", fewer)
        if section.engine.startswith("vllm"):
            return
        yield Item("keys and values", min(self._keys_and_values(), reserved), "rollout", fewer)
        row = self.policy.vocabulary * 4
        yield Item(
            "logits of the tokens being sampled", self.sampled * row // self._waves(), "rollout", fewer
        )
        if on_cpu and self.width == 2:
            packed = (self.policy.matrices + self.policy.head) * 2
            yield Item("linear layers, packed for sampling on a CPU", packed, "rollout", "rollout.engine=hf")

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
        yield Item("logits, in tiles", logits, "learn", "none: its size is bounded")

    def _keys_and_values(self) -> int:
        tokens = self.prompts * self.prompt_tokens + self.sampled * self.completion_tokens
        return int(tokens * self.policy.key_value_bytes)

    def _waves(self) -> int:
        """How many times the key-value cache is filled in a step, when it cannot hold all groups at once."""
        return max(1, -(-self._keys_and_values() // int(self.config.rollout.kv_cache_gib * GIB)))

    def _forward(self, sizes: ModelSizes) -> float:
        """Floating-point operations of a forward pass over all groups, without the head: 2 for each weight
        and token, and `4 * sizes.attended` for each pair of tokens of which one attends to the other.
        """
        prompt, completion = self.prompt_tokens, self.completion_tokens
        pairs = self.prompts * prompt**2 / 2 + self.rows * completion * (prompt + completion / 2)
        return 2 * sizes.matrices * self.packed_tokens + 4 * sizes.attended * pairs

    def _head(self, sizes: ModelSizes) -> float:
        """Floating-point operations of the language-model head over all completions."""
        return 2 * sizes.head * self.rows * self.completion_tokens

    @property
    def _passes_before(self) -> tuple[int, int]:
        """Forward passes of policy and reference without gradient, before and between the updates."""
        section, algorithm = self.config.learner, self.inputs.algorithm
        in_reward = algorithm.kl.coef > 0 and algorithm.kl.placement == "reward"
        old = (section.epochs * section.minibatches > 1 and algorithm.has_advantages) or in_reward
        if algorithm.needs_exact_kl:
            return int(old) + int(algorithm.needs_iterate), section.epochs
        baseline = "none" if algorithm.preference is None else algorithm.preference.baseline
        asked = algorithm.needs_reference and not self.config.data.precompute_reference
        # the iterate has the policy's size; a baseline needs the policy's log-probs, or those of both models
        # behind other prompts
        policy = int(old) + int(algorithm.needs_iterate) + int(baseline != "none")
        return policy, int(asked) + int(baseline == "other_prompts")

    def seconds_of_rollout(self, machine: Machine) -> float:
        """Decoding one token reads all weights once for all completions that are decoded together."""
        if not self.samples:
            return 0.0
        sizes, waves = self.policy, self._waves()
        prefill = 2 * sizes.matrices * self.prompts * self.prompt_tokens / machine.flops
        multiplied = sizes.matrices + sizes.head
        read = multiplied * self.width + self._keys_and_values() / waves / 2
        compute = 2 * multiplied * self.sampled / waves
        step = max(read / machine.bandwidth, compute / machine.flops)
        return prefill + waves * self.completion_tokens * step

    def seconds_of_learning(self, machine: Machine) -> float:
        """A backward pass costs two forward passes, or one where an adapter leaves the weights frozen."""
        section = self.config.learner
        again = int(self.config.model.gradient_checkpointing)
        own = self._forward(self.policy)
        back = 2 if self.config.model.lora is None else 1
        work = section.epochs * ((1 + again + back) * own + 3 * self._head(self.policy))
        if self.inputs.algorithm.chase is not None:
            # the slow adapter has the same, and a forward pass for its margins
            work += work + section.epochs * (own + self._head(self.policy))
        of_policy, of_reference = self._passes_before
        work += of_policy * (own + self._head(self.policy))
        # each of several references sees a part of the groups: as if the parts were equal
        for sizes in self.references.values():
            work += of_reference * (self._forward(sizes) + self._head(sizes)) / len(self.references)
        if self.critic is not None:
            work += (section.epochs * (3 + again) + 1) * self._forward(self.critic)
        # bytes: AdamW reads weight, gradient and both moments, and writes all but the gradient, 4 bytes each
        touched = self._updates * sum(count for _, _, count in self.learned) / self.shards * 28
        return work / machine.flops + touched / machine.bandwidth

    @property
    def _updates(self) -> int:
        return self.config.learner.epochs * self.config.learner.minibatches

    def summed(self) -> int:
        """Bytes of float32 gradients sent for their sum; a ring all-reduce sends 2 (n-1)/n of them."""
        groups = self.ranks // self.shards
        learned = sum(count for _, _, count in self.learned)
        return int(self._updates * 4 * learned / self.shards * 2 * (groups - 1) / groups)

    def gathered(self) -> int:
        """Bytes sent within a shard group: a ring sends (n-1)/n of the weights in each pass and once for the
        engine, and (n-1)/n of the gradients.
        """
        if self.shards == 1:
            return 0
        part = (self.shards - 1) / self.shards
        micros = math.ceil(self.packed_tokens / self.config.learner.minibatches / self.microbatch_tokens)
        passes = micros * (2 * self._updates + self.config.learner.minibatches * sum(self._passes_before))
        learned = sum(count for _, _, count in self.learned)
        each = learned * (passes * self.width + self._updates * micros * 4)
        return int(part * (each + self.policy.weights * self.width))
