"""Runs a model for the native engine: prompts and single tokens in, logits of the next tokens out."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from rlhf.rollout.engine import ImageInputs, RolloutRequest
from rlhf.rollout.learner_module import Model, sampling_mode
from rlhf.rollout.native.cache import AttentionPass, Decode, Kept, Prefill, SharedPrefixCache, last_tokens
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
        """Whether a prompt may begin with keys and values that are kept: not where images give positions."""
        return self.image_inputs is None

    def new_cache(
        self,
        prompt_lengths: Sequence[int],
        group_sizes: Sequence[int],
        max_tokens: int,
        begun: Mapping[int, Kept],
    ) -> SharedPrefixCache:
        """A cache for groups of at most `max_tokens` tokens a row; `begun`: what is known of some prompts."""
        return SharedPrefixCache(prompt_lengths, group_sizes, max_tokens, begun)

    def prefill(
        self, cache: SharedPrefixCache, requests: Sequence[RolloutRequest], batch: Sequence[int]
    ) -> tuple[Float[Tensor, "P V"], list[int]]:
        """Stores the prompts numbered `batch`, P of them, of a cache that was made for those of `requests`.

        Returns their next-token logits, and the position of each one's next token.
        """
        device = self.model.device
        prompts = [requests[p].prompt for p in batch]
        lengths = [len(prompt.token_ids) for prompt in prompts]
        starts = [cache.begun[p].length if p in cache.begun else 0 for p in batch]
        rest = [length - start for length, start in zip(lengths, starts, strict=True)]
        last, attention = last_tokens(rest).to(device), Prefill(cache, batch)
        if self.image_inputs is not None and any(prompt.images for prompt in prompts):
            hidden, following = self.image_inputs.read(prompts, rollout_pass=attention)
            return self.model.get_output_embeddings()(hidden[0, last]), following
        new = [prompt.token_ids[start:] for prompt, start in zip(prompts, starts, strict=True)]
        tokens = torch.tensor([token for ids in new for token in ids], device=device)
        positions = torch.cat([torch.arange(a, b) for a, b in zip(starts, lengths, strict=True)]).to(device)
        return self._forward(tokens[None], positions[None], attention, last)[0], lengths

    def decode(
        self, tokens: Tensor, positions: Tensor, caches: Sequence[SharedPrefixCache], sampling: RowSampling
    ) -> Float[Tensor, "S V"]:
        """Next-token logits after one more token `[S]` of every row of the caches, end to end.

        `sampling` says how the rows are sampled; here it is not used.
        """
        return self._forward(tokens[:, None], positions[:, None], Decode(caches), 1)[:, 0]

    def clear(self) -> None:
        """Frees packed weights."""
        self.linears.clear()

    def _forward(
        self, tokens: Tensor, positions: Tensor, attention: AttentionPass, keep: int | Tensor
    ) -> Float[Tensor, "B T V"]:
        return self.model(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=keep,
            rollout_pass=attention,
        ).logits
