"""The policy (or frozen reference): packed groups -> log-prob, entropy and KL of every completion token.

The language-model head is never called: the hidden states that predict completion tokens and the head's
weight go to `token_stats`, which computes the statistics without storing the logits. When a policy is loaded
(`loading.py`), a few tokens are compared with the model's own forward (`self_test.py`), so that a model whose
head computes something else is refused instead of trained wrongly.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.config.model import LoraConfig
from rlhf.kernels.token_stats import TokenStats
from rlhf.models.attention import constant_up_to, set_attention
from rlhf.models.heads import Head
from rlhf.models.layers.checkpointing import checkpoint_layers
from rlhf.models.layers.recompute import recomputing
from rlhf.models.layers.shared_prefix import SHARED_PREFIX
from rlhf.models.lora import Adapter
from rlhf.models.memory_mapped import MemoryMappedWeights
from rlhf.models.packing import Layout, Packed, least, padded, separate
from rlhf.models.pretrained import ModelError, model_folder
from rlhf.models.sharding import backbone, free_gathered, gathered
from rlhf.models.vision.embeddings import Vision
from rlhf.models.vision.processor import Processor
from rlhf.rollout.learner_module import exact_attention


class Trunk:
    """A causal transformer that turns packed groups into hidden states, for any kind of head.

    `layout` (`packing.Layout`) says whether prompts are shared within a group and whether sequences are
    padded. The packed layouts need the attention of layers/shared_prefix.py; any causal model can do
    "padded".
    """

    def __init__(self, model: PreTrainedModel, *, layout: Layout, processor: Processor | None = None) -> None:
        self.model = model
        self.vision = None if processor is None else Vision(model, processor)
        self._longest = constant_up_to(model.config)
        self.layout = layout

    @property
    def layout(self) -> Layout:
        return self._layout

    @layout.setter
    def layout(self, layout: Layout) -> None:
        # the attention stays set between passes: with activation checkpointing, backward runs the forward
        # again
        self._layout: Layout = layout
        set_attention(self.model, exact_attention(self.model) if layout == "padded" else SHARED_PREFIX)

    def freeze(self, dtype: torch.dtype) -> None:
        """Turns the model into a frozen reference: no gradients, weights in the compute type `dtype`."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)

    def checkpoint_activations(self) -> None:
        """Saves activation memory by running each layer's forward a second time in the backward pass.

        Raises ModelError: the model has no layers that can be checkpointed.
        """
        checkpoint_layers(self.model)

    @recomputing()
    def hidden(self, packed: Packed) -> Tensor:
        """Hidden states `[N, H]` that predict the completion tokens.

        Raises ImageError: an image cannot be read or does not fit its prompt; ModelError: a prompt has images
        and the model was loaded without an image processor, or a sequence is too long (`constant_up_to`).
        """
        if (packed.images or packed.observed) and self.vision is None:
            kind = type(self.model).__name__
            raise ModelError(f"a prompt has images, but {kind} was loaded without an image processor")
        if self._longest is not None and packed.longest > self._longest:
            raise ModelError(
                f"a sequence of {packed.longest} tokens is longer than the {self._longest} up to which the "
                "rotary factors of the model are the same (LongRoPE or dynamic RoPE): give shorter ones"
            )
        if self.layout == "padded":
            token_ids, mask, rows = padded(packed)
            if self.vision is not None:
                return self.vision.padded_states(packed, mask).flatten(0, 1)[rows]
            states = backbone(self.model, input_ids=token_ids, attention_mask=mask, use_cache=False)
            return states.flatten(0, 1)[rows]
        packed = packed if self.layout == "shared_prefix" else separate(packed)
        # without a mask, transformers would look for sequences in the positions, and wait for a GPU to tell
        everything = torch.ones_like(packed.token_ids[None], dtype=torch.bool)
        arguments: dict[str, Any] = {"spans": packed.spans, "attention_mask": everything}
        if self.vision is not None:
            return self.vision.states(packed, **arguments)[0, packed.rows]
        states = backbone(
            self.model,
            input_ids=packed.token_ids[None],
            position_ids=packed.positions[None],
            use_cache=False,
            **arguments,
        )  # [1, T, H]
        return states[0, packed.rows]


class Policy(Trunk):
    """A causal language model: a `Trunk` and a head that gives the log-probs of tokens."""

    def __init__(self, model: PreTrainedModel, *, layout: Layout, processor: Processor | None = None) -> None:
        self.head = Head.of(model)
        super().__init__(model, layout=layout, processor=processor)
        self.adapter: Adapter | None = None
        self._mapped: MemoryMappedWeights | None = None
        self.replica: PreTrainedModel | None = None
        """A whole copy of a sharded model, for an engine in this process to sample from; else None."""

    def add_adapter(self, section: LoraConfig, *, seed: int) -> None:
        """Adds a LoRA adapter, which is trained in place of the model. Raises ModelError like `Adapter`."""
        self.adapter = Adapter(self.model, section, seed=seed)

    @property
    def rollout_model(self) -> PreTrainedModel:
        """The model that an engine samples from or is sent: `model`, or the copy that `merge` writes to."""
        if self.replica is not None:
            return self.replica
        return self.model if self.adapter is None else self.adapter.merged

    def merge(self) -> None:
        """Brings `rollout_model` up to date. Every rank calls it, because it may gather shards."""
        if self.replica is not None:
            copies = dict(self.replica.named_parameters())
            for name, weight in gathered(self.model):
                copies[name].copy_(weight)
        if self.adapter is not None:
            self.adapter.merge()

    def statistics(
        self,
        packed: Packed,
        *,
        temperature: float,
        want: tuple[str, ...],
        reference: Policy | None = None,
        hidden: Tensor | None = None,
    ) -> TokenStats:
        """Statistics `[N]` of `packed.targets`, in nats, at `temperature`; with gradient if enabled.

        `want`: names of the statistics, as `token_stats` has them. With a `reference`, its log-prob and the
        exact KLs can be wanted too; none carries gradient into the reference, which may be a model of another
        width (`Head.beside` says of which vocabulary). Log-probs of both models are renormalised over
        `packed.candidates` where there are any; entropy and KL are of the whole vocabulary. `hidden`
        `[N, H]`: the hidden states of `packed`, if they are known already.
        """
        ref_arguments: dict[str, Any] = {}
        # the policy first, also where a caller has made its pass: ranks that share the shards of both models
        # gather them in the same order
        states = self.hidden(packed) if hidden is None else hidden
        if reference is not None:
            with torch.no_grad():
                ref_arguments = reference.head.beside(self.head, reference.hidden(packed))
        statistics = self.head.statistics(
            states,
            packed.targets,
            temperature=temperature,
            want=want,
            candidates=packed.candidates,
            num_targets=packed.num_targets,
            **ref_arguments,
        )
        if reference is not None:
            reference.free_memory()
        if not torch.is_grad_enabled():
            self.free_memory()
        return statistics

    def leave_in_file(self, path: str) -> None:
        """Maps the weights of a frozen model on a CPU from the files at `path` (memory_mapped.py)."""
        self._mapped = MemoryMappedWeights(self.model, model_folder(path))

    def free_memory(self) -> None:
        """Frees the weights that a pass without backward has gathered from shards or mapped from files."""
        free_gathered(self.model)
        if self._mapped is not None:
            self._mapped.release_pages()

    def give_up(self) -> None:
        """Frees the weights of a frozen model that is not asked again."""
        self.free_memory()
        self._mapped = None
        torch.nn.Module.to(self.model, "meta")

    def divergence(self, packed: Packed, hidden: Tensor, other: Tensor, *, temperature: float) -> Tensor:
        """Exact KL `[N]` of the policy at states `hidden` from the policy at states `other`, both `[N, H]`.

        KL(policy(hidden) || policy(other)), in nats, with gradient into `hidden` and the head alone.
        """
        kl = self.head.statistics(
            hidden,
            packed.targets,
            temperature=temperature,
            want=("kl",),
            num_targets=packed.num_targets,
            ref_hidden=other,
            ref_weight=self.head.module.weight,
            ref_bias=self.head.module.bias,
        ).kl
        assert kl is not None
        return kl

    @torch.no_grad()
    def logits(self, packed: Packed) -> Tensor:
        """Logits `[N, V]` in float32, at temperature 1. They take much memory: only for a few tokens."""
        logits = self.head.logits(self.hidden(packed))
        free_gathered(self.model)
        return logits

    def dummy_pass(self, reference: Policy | None = None) -> Tensor:
        """A zero that depends on every weight.

        A sharded rank without data computes it, because all ranks have to take part in every pass.
        """
        packed = least(self.model.device)
        logprob = self.statistics(packed, temperature=1.0, want=("logprob",), reference=reference).logprob
        assert logprob is not None
        return logprob.sum() * 0.0


class WithoutAdapter(Policy):
    """The reference of a policy with an adapter: the same weights and layout, the adapter switched off."""

    def __init__(self, policy: Policy) -> None:
        assert policy.adapter is not None
        super().__init__(policy.model, layout=policy.layout)
        self.vision = policy.vision
        self._policy, self._trained = policy, policy.adapter

    def hidden(self, packed: Packed) -> Tensor:
        with self._trained.off():
            return self._policy.hidden(packed)

    @property
    def rollout_model(self) -> PreTrainedModel:
        return self._trained.base_model

    def give_up(self) -> None:
        """Nothing: the weights are the policy's."""


class WithAdapterOf(Policy):
    """An earlier version of a policy with an adapter: the same weights and layout, and A and B of its own."""

    def __init__(self, policy: Policy) -> None:
        assert policy.adapter is not None
        super().__init__(policy.model, layout=policy.layout)
        self.vision = policy.vision
        self._policy, self._trained = policy, policy.adapter
        self.weights = {
            name: torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            for name, weight in self._trained.weights.items()
        }
        """A and B of that version."""
        self._merged: PreTrainedModel | None = None

    def hidden(self, packed: Packed) -> Tensor:
        assert not torch.is_grad_enabled(), "a backward would see the trained adapter"
        with self._trained.holding(self.weights):
            return self._policy.hidden(packed)

    @property
    def rollout_model(self) -> PreTrainedModel:
        """A copy of the weights with this version's adapter merged; made when it is first asked for."""
        if self._merged is None:
            base = self._trained.base_model
            self._merged = copy.deepcopy(base, {id(p): p for p in base.parameters()})
            self.merge()
        return self._merged

    def merge(self) -> None:
        if self._merged is not None:
            with self._trained.holding(self.weights):
                self._trained.merge(self._merged)
