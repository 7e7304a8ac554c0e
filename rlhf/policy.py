"""The actor and its frozen reference: packed groups in, statistics of every completion token out.

The language-model head is never called: hidden states of the completion rows and the head's weight go to
`token_stats`, which returns log-prob, entropy and KL without the logits. `Policy.load` checks on a few tokens
that this gives what the model's own forward gives: another kind of head is refused, not mistrained.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.attention import FOLD_UP_TO, SHARED_PREFIX
from rlhf.config import LoraConfig, ModelConfig
from rlhf.kernels.token_stats import TokenStats, token_stats, whole
from rlhf.lora import Adapter
from rlhf.mapped import MappedWeights
from rlhf.packing import Layout, Packed, least, pack, padded, separate
from rlhf.pretrained import (
    ModelError,
    attention_of,
    checkpoint_activations,
    head_of,
    load_model,
    model_folder,
    set_attention,
    takes_attention,
    text_settings,
)
from rlhf.processor import Processor
from rlhf.recompute import recomputing
from rlhf.sharding import Sharding, backbone, gathered, give_up, open_policy
from rlhf.sight import difference, sight_error
from rlhf.truncation import Side, among_kept, merged, still_wanted
from rlhf.types import Kept
from rlhf.vision import Vision

LONG_PROMPT = FOLD_UP_TO + 2
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Head:
    """How a model turns hidden states into logits: `softcap(scale * (h W^T + b))`."""

    module: nn.Linear
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        module = head_of(model)
        if not isinstance(module, nn.Linear):
            raise ModelError(
                f"{type(model).__name__} has no linear language-model head, got {type(module).__name__}"
            )
        settings = text_settings(model.config)
        scale = settings.get("logit_scale") or 1.0 / (settings.get("logits_scaling") or 1.0)
        return cls(module, settings.get("final_logit_softcapping"), scale)

    def statistics(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        temperature: float,
        want: tuple[str, ...],
        kept: Kept | None = None,
        **against: Any,
    ) -> TokenStats:
        """`token_stats` under this head; `against`: the `ref_...` arguments of another model.

        Log-probs among the `kept` tokens, where these are known.
        """
        weight, bias = whole(self.module.weight), self.module.bias
        scaling: Any = {"temperature": temperature, "softcap": self.softcap, "logit_scale": self.scale}
        sides: dict[str, Side] = {"logprob": (hidden, weight, bias)}
        if against:
            sides["ref_logprob"] = against["ref_hidden"], against["ref_weight"], against["ref_bias"]
        found = among_kept(kept, want, sides, scaling)
        statistics = TokenStats()
        if missing := still_wanted(want, found, kept):
            # all of them are tokens: told so, the host need not wait for a GPU that counts them
            statistics = token_stats(
                hidden, weight, targets, bias=bias, want=missing, num_kept=len(targets), **scaling, **against
            )
        return merged(statistics, found, kept)


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

    def fit(self, path: str, asked: str, error: Callable[[], str | None]) -> None:
        """Takes the best layout that the model can do, or the one asked for; says why not a better one.

        `error` compares the layout with the model's own forward and tells the difference. Raises ModelError:
        the model cannot do what was asked, or not even padded rows give what it computes itself.
        """
        reasons: list[str] = []
        for layout in LAYOUTS if asked == "auto" else (cast(Layout, asked),):
            reason = why_not(self.model, layout)
            if reason is None:
                self.layout = layout
                try:
                    reason = error()
                except NotImplementedError as refusal:
                    reason = str(refusal)
            if reason is None:
                if reasons:
                    how = {"packed": "sequences are packed", "padded": "sequences are padded"}[layout]
                    log.warning(
                        "%s: prompts are not shared within a group, because %s; %s", path, reasons[0], how
                    )
                return
            reasons.append(reason)
        if asked in ("auto", "padded"):
            raise ModelError(
                f"{path}: log-probs from hidden states and head are not those of the model ({reasons[-1]})"
            )
        raise ModelError(f"model.packing is {asked}, but {path} cannot: {reasons[0]}")

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
            raise ModelError(f"a prompt has pictures, but {type(self.model).__name__} has no eyes here")
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
        self._mapped: MappedWeights | None = None
        self.replica: PreTrainedModel | None = None
        """The whole of a model that learns in shards, where an engine of this process samples from it."""

    @classmethod
    def load(
        cls, section: ModelConfig, path: str, device: torch.device, processor: Processor | None = None
    ) -> Policy:
        """Loads the weights in float32 (the optimizer makes its masters from them) and checks the forward.

        Raises ModelError: the model cannot be loaded, its head is of another kind, or it cannot do the
        packing that was asked for (the reason is named).
        """
        return cls._checked(section, path, load_model(path, device), processor)

    @classmethod
    def load_sharded(cls, section: ModelConfig, path: str, sharding: Sharding, *, trains: bool) -> Policy:
        """In shards, of float32 where it `trains`; checked in float32, then opened in the compute type."""
        policy = cls._checked(section, path, open_policy(path, sharding.exact(), trains=trains))
        give_up(policy.model)
        if sharding.computed == torch.float32:
            return policy
        layout = policy.layout
        del policy
        model = open_policy(path, sharding, trains=trains)
        without_dropout(model)
        reopened = cls(model, layout=layout)
        with torch.no_grad():
            reopened.idle()
        return reopened

    @classmethod
    def _checked(
        cls, section: ModelConfig, path: str, model: PreTrainedModel, processor: Processor | None = None
    ) -> Policy:
        without_dropout(model)
        policy = cls(model, layout="padded", processor=processor)
        policy.fit(path, section.packing, lambda: forward_error(policy) or sight_error(policy))
        return policy

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
            states, packed.targets, temperature=temperature, want=want, kept=packed.kept, **against
        )
        if reference is not None:
            reference.rest()
        if not torch.is_grad_enabled():
            self.rest()
        return statistics

    def leave_in_file(self, path: str) -> None:
        """Of a frozen model on a CPU: its weights are read from their file at each pass (mapped.py)."""
        self._mapped = MappedWeights(self.model, model_folder(path))

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

    def idle(self, reference: Policy | None = None) -> Tensor:
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


def without_dropout(model: PreTrainedModel) -> None:
    """Log-probs before and after an update must be those of one function."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # attention modules keep a copy of the config's
        if "attention_dropout" in vars(module):
            cast(Any, module).attention_dropout = 0.0


def why_not(model: PreTrainedModel, layout: Layout) -> str | None:
    """The reason, as far as the settings of a model tell, why it cannot do a layout; None when it may."""
    if layout == "padded":
        return None
    settings = text_settings(model.config)
    kinds: set[str] = set(settings.get("layer_types") or ())
    others = kinds - {"full_attention", "sliding_attention"}
    if others:
        return f"it has layers of kind {', '.join(sorted(others))}"
    if settings.get("attn_logit_softcapping"):
        return "it caps attention logits"
    if not takes_attention(model):
        return f"{type(model).__name__} does not take its attention from transformers' AttentionInterface"
    window = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    if layout == "shared_prefix" and ("sliding_attention" in kinds or (window and not kinds)):
        return f"it attends to a sliding window of {window} tokens"
    return None


@torch.no_grad()
def forward_error(policy: Policy) -> str | None:
    """Compares `policy` with the model's own full forward on a few tokens; None when they agree.

    The scale of a real difference is what changing the prompt's first token does to the log-probs: they agree
    when they differ by less than a hundredth of that.
    """
    room = text_settings(policy.model.config).get("max_position_embeddings") or LONG_PROMPT + 7
    ids = torch.arange(2, LONG_PROMPT + 9, device=policy.model.device) % policy.head.module.out_features
    # on a CPU the long one takes another way through the attention, with all that is packed with it
    prompts = [ids[:5], ids[: min(LONG_PROMPT, room - 7)]]
    completions = [ids[5:12], ids[4:7]]
    want = ("logprob",)
    found = [policy.statistics(pack([p], [completions]), temperature=1.0, want=want) for p in prompts]
    got = torch.cat([stats.logprob for stats in found if stats.logprob is not None])
    layout, policy.layout = policy.layout, "padded"
    full = torch.cat([_full_forward(policy.model, p, completions) for p in prompts])
    others = [torch.cat([ids[8:9], p[1:]]) for p in prompts]
    elsewhere = torch.cat([_full_forward(policy.model, p, completions) for p in others])
    policy.layout = layout
    return difference(got, full, elsewhere, "prompt")


def _full_forward(model: PreTrainedModel, prompt: Tensor, completions: list[Tensor]) -> Tensor:
    parts: list[Tensor] = []
    for completion in completions:
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        parts.append(logits.float().log_softmax(-1).gather(-1, completion[:, None])[:, 0])
    return torch.cat(parts)
