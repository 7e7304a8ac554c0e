"""The actor and its frozen reference: packed groups in, statistics of every completion token out.

The language-model head is never called: hidden states of the completion rows and the head's weight go to
`token_stats`, which returns log-prob, entropy and KL without the logits. When a policy is loaded
(`loading.py`), a few tokens show whether this gives what the model's own forward gives (`self_test.py`):
another kind of head is refused, not mistrained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.config.model import LoraConfig
from rlhf.kernels.token_stats import TokenStats, whole
from rlhf.models.heads import Head
from rlhf.models.layers.recompute import recomputing
from rlhf.models.layers.shared_prefix import SHARED_PREFIX
from rlhf.models.lora import Adapter
from rlhf.models.memory_mapped import MemoryMappedWeights
from rlhf.models.packing import Layout, Packed, least, padded, separate
from rlhf.models.pretrained import (
    ModelError,
    attention_of,
    checkpoint_activations,
    model_folder,
    set_attention,
)
from rlhf.models.sharding import backbone, gathered, give_up
from rlhf.models.vision.embeddings import Vision
from rlhf.models.vision.processor import Processor


class Trunk:
    """A causal transformer and how packed groups go through it, whatever head their hidden states go to.

    `layout`: the prompt of a group is computed once, or with every sequence, packed (rlhf/attention.py); or
    every sequence is a padded row of its own, which any causal model can do.
    """

    def __init__(self, model: PreTrainedModel, *, layout: Layout, processor: Processor | None = None) -> None:
        self.model = model
        self.vision = None if processor is None else Vision(model, processor)
        self._own_attention = attention_of(model)
        self.layout = layout

    @property
    def layout(self) -> Layout:
        return self._layout

    @layout.setter
    def layout(self, layout: Layout) -> None:
        """Stays set between passes: a checkpointed backward runs the forward, attention included, again."""
        self._layout: Layout = layout
        set_attention(self.model, self._own_attention if layout == "padded" else SHARED_PREFIX)

    def freeze(self, dtype: torch.dtype) -> None:
        """Makes a reference of it: no gradient, weights in the compute type."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)

    def checkpoint_activations(self) -> None:
        """Trades a second forward for the memory of activations. Training mode does no more: no dropout."""
        checkpoint_activations(self.model)
        self.model.train()

    @recomputing()
    def hidden(self, packed: Packed) -> Tensor:
        """Hidden states `[N, H]` that predict the completion tokens. Raises ImageError (rlhf/vision.py)."""
        if packed.images and self.vision is None:
            kind = type(self.model).__name__
            raise ModelError(f"a prompt has pictures, but {kind} was loaded without an image processor")
        if self.layout == "padded":
            token_ids, mask, rows = padded(packed)
            if self.vision is not None:
                return self.vision.padded_states(packed, mask).flatten(0, 1)[rows]
            states = backbone(self.model, input_ids=token_ids, attention_mask=mask, use_cache=False)
            return states.flatten(0, 1)[rows]
        packed = packed if self.layout == "shared_prefix" else separate(packed)
        if self.vision is not None:
            return self.vision.states(packed, spans=packed.spans)[0, packed.rows]
        states = backbone(
            self.model,
            input_ids=packed.token_ids[None],
            position_ids=packed.positions[None],
            use_cache=False,
            spans=packed.spans,
        )
        return states[0, packed.rows]


class Policy(Trunk):
    """A causal language model: a trunk and a head that gives the log-probs of tokens."""

    def __init__(self, model: PreTrainedModel, *, layout: Layout, processor: Processor | None = None) -> None:
        self.head = Head.of(model)
        super().__init__(model, layout=layout, processor=processor)
        self.adapter: Adapter | None = None
        self._mapped: MemoryMappedWeights | None = None
        self.replica: PreTrainedModel | None = None
        """The whole of a model that learns in shards, where an engine of this process samples from it."""

    def add_adapter(self, section: LoraConfig, *, seed: int) -> None:
        """From here on a LoRA adapter is what learns. Raises ModelError: it does not fit the model."""
        self.adapter = Adapter(self.model, section, seed=seed)

    @property
    def rollout_model(self) -> PreTrainedModel:
        """What an engine samples from or is sent: the model itself, or the copy `merge` writes to."""
        if self.replica is not None:
            return self.replica
        return self.model if self.adapter is None else self.adapter.merged

    def merge(self) -> None:
        """Brings `rollout_model` up to date. Every rank calls it."""
        if self.replica is not None:
            own = dict(self.replica.named_parameters())
            for name, weight in gathered(self.model):
                own[name].copy_(weight)
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
        """Per-token statistics `[N]` at `temperature`, of the whole vocabulary, with gradient if enabled.

        Log-probs, the reference's too, are of what a token was drawn from, where `packed` says that.

        With a `reference`, also its log-prob and, where wanted, the exact KL (no gradient into it). `hidden`
        are the states of `packed` where they are known already.
        """
        against: dict[str, Any] = {}
        if reference is not None:
            with torch.no_grad():
                against = {
                    "ref_hidden": reference.hidden(packed),
                    "ref_weight": whole(reference.head.module.weight),
                    "ref_bias": reference.head.module.bias,
                }
        states = self.hidden(packed) if hidden is None else hidden
        statistics = self.head.statistics(
            states,
            packed.targets,
            temperature=temperature,
            want=want,
            candidates=packed.candidates,
            **against,
        )
        if reference is not None:
            reference.rest()
        if not torch.is_grad_enabled():
            self.rest()
        return statistics

    def leave_in_file(self, path: str) -> None:
        """Of a frozen model on a CPU: its weights are read from their file at each pass (mapped.py)."""
        self._mapped = MemoryMappedWeights(self.model, model_folder(path))

    def rest(self) -> None:
        """Gives up what a pass without backward has gathered of shards, or read of a file."""
        give_up(self.model)
        if self._mapped is not None:
            self._mapped.give_up()

    def divergence(self, packed: Packed, hidden: Tensor, other: Tensor, *, temperature: float) -> Tensor:
        """KL(policy at `hidden` || policy at `other` states) `[N]`, exact; gradient into the former alone."""
        kl = self.head.statistics(
            hidden,
            packed.targets,
            temperature=temperature,
            want=("kl",),
            ref_hidden=other,
            ref_weight=self.head.module.weight,
            ref_bias=self.head.module.bias,
        ).kl
        assert kl is not None
        return kl

    @torch.no_grad()
    def logits(self, packed: Packed) -> Tensor:
        """`[N, V]` in float32, at temperature 1: for a few tokens."""
        head = self.head
        logits = head.scale * nn.functional.linear(self.hidden(packed), head.module.weight, head.module.bias)
        give_up(self.model)
        logits = logits.float()
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

    def dummy_pass(self, reference: Policy | None = None) -> Tensor:
        """A zero that depends on every weight: the pass of a sharded rank that has nothing to compute."""
        packed = least(self.model.device)
        logprob = self.statistics(packed, temperature=1.0, want=("logprob",), reference=reference).logprob
        assert logprob is not None
        return logprob.sum() * 0.0


class WithoutAdapter(Policy):
    """The reference under a policy with an adapter: the same weights and layout, the adapter switched off."""

    def __init__(self, policy: Policy) -> None:
        assert policy.adapter is not None
        super().__init__(policy.model, layout=policy.layout)
        self.vision = policy.vision
        self._policy, self._trained = policy, policy.adapter

    def hidden(self, packed: Packed) -> Tensor:
        with self._trained.off():
            return self._policy.hidden(packed)
