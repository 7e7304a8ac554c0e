"""Runs a model for the native engine: prompts and new tokens in, logits of the next tokens out."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from rlhf.rollout.engine import ImageInputs, RolloutRequest
from rlhf.rollout.learner_module import Model, sampling_mode
from rlhf.rollout.native.cache import AttentionPass, Decode, Prefill, SharedPrefixCache, last_tokens
from rlhf.rollout.native.cpu_linear import PackedLinears
from rlhf.rollout.sampling import RowSampling

ATTENTION = "tandem_rollout"
_BEYOND_SOFTMAX = ("softcap", "s_aux", "position_bias")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    rollout_pass: AttentionPass | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of every layer while the engine runs the model."""
    extra = [name for name in _BEYOND_SOFTMAX if kwargs.get(name) is not None]
    if attention_mask is not None:
        extra.append("its own mask")
    if rollout_pass is None:
        raise ValueError("it does not pass keyword arguments on to its attention")
    if sliding_window is not None and sliding_window < rollout_pass.longest:
        extra.append(f"a sliding window of {sliding_window} tokens")
    if extra:
        raise ValueError(f"its attention has {', '.join(extra)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return rollout_pass.attend(int(cast(Any, module).layer_idx), query, key, value, scale), None


cast(Any, AttentionInterface).register(ATTENTION, _attention)


class Decoder:
    """One model, whose keys and values are in the caches that it is given."""

    def __init__(self, model: Model, image_inputs: ImageInputs | None) -> None:
        self.model, self.image_inputs = model, image_inputs
        self.linears = PackedLinears(model)

    @contextmanager
    def running(self) -> Generator[None]:
        """Within this context `prefill` and `decode` may be called."""
        with sampling_mode(self.model, ATTENTION), self.linears.installed():
            yield

    @property
    def keeps_samples(self) -> bool:
        """Whether finished rows may be continued: not where images give positions."""
        return self.image_inputs is None

    def new_cache(
        self, prompt_lengths: Sequence[int], group_sizes: Sequence[int], max_tokens: int
    ) -> SharedPrefixCache:
        """A cache for groups of at most `max_tokens` tokens a row."""
        return SharedPrefixCache(prompt_lengths, group_sizes, max_tokens)

    def prefill(
        self, cache: SharedPrefixCache, requests: Sequence[RolloutRequest], batch: Sequence[int]
    ) -> tuple[Float[Tensor, "P V"], list[int]]:
        """Stores the prompts numbered `batch`, P of them, of a cache that was made for those of `requests`.

        Returns their next-token logits, and the position of each one's next token.
        """
        device = self.model.device
        prompts = [requests[p].prompt for p in batch]
        lengths = [len(prompt.token_ids) for prompt in prompts]
        last, attention = last_tokens(lengths).to(device), Prefill(cache, batch)
        if self.image_inputs is not None and any(prompt.images for prompt in prompts):
            hidden, following = self.image_inputs.read(prompts, rollout_pass=attention)
            return self.model.get_output_embeddings()(hidden[0, last]), following
        tokens = torch.tensor([token for prompt in prompts for token in prompt.token_ids], device=device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        return self._forward(tokens, positions, attention, last), lengths

    def decode(
        self, tokens: Tensor, positions: Tensor, caches: Sequence[SharedPrefixCache], sampling: RowSampling
    ) -> Float[Tensor, "S V"]:
        """Next-token logits of every decoded row after its new tokens, which lie end to end: `[N]`.

        `sampling` says how the rows are sampled; here it is not used.
        """
        last = last_tokens([count for cache in caches for count in cache.new_tokens]).to(tokens.device)
        return self._forward(tokens, positions, Decode(caches), last)

    def clear(self) -> None:
        """Frees packed weights."""
        self.linears.clear()

    def _forward(
        self, tokens: Tensor, positions: Tensor, attention: AttentionPass, last: Tensor
    ) -> Float[Tensor, "S V"]:
        return self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=last,
            rollout_pass=attention,
        ).logits[0]
