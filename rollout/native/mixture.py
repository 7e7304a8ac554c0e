"""The native engine for a mixture of two models (`rollout/mixture.py`): each has its own keys and values.

Every prefill and every decoding step runs both models on the same tokens; then their logits are mixed row by
row, each with the weight of its request. All else is the native engine, which runs one model where this one
runs two.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf.rollout.engine import EngineError, ImageInputs, RolloutRequest
from rlhf.rollout.mixture import OtherModel, check_mixable, mixed_logits
from rlhf.rollout.native.cache import SharedPrefixCache
from rlhf.rollout.native.decoder import Decoder
from rlhf.rollout.native.engine import NativeEngine
from rlhf.rollout.sampling import RowSampling


class _TwoCaches(SharedPrefixCache):
    """The policy's cache, and the other model's beside it; their prompts and rows are the same."""

    def __init__(self, prompt_lengths: Sequence[int], group_sizes: Sequence[int], max_tokens: int) -> None:
        super().__init__(prompt_lengths, group_sizes, max_tokens)
        self.other = SharedPrefixCache(prompt_lengths, group_sizes, max_tokens)

    @property
    def bytes_per_token(self) -> int:
        return super().bytes_per_token + self.other.bytes_per_token

    def begin_step(self) -> None:
        super().begin_step()
        self.other.begin_step()

    def end_step(self) -> None:
        super().end_step()
        self.other.end_step()

    def arrange(self, decoded: Sequence[int], waiting: Sequence[int]) -> list[int]:
        self.other.arrange(decoded, waiting)
        return super().arrange(decoded, waiting)


class _MixtureDecoder(Decoder):
    """Runs the policy and then `beside`, the decoder of the other model."""

    def __init__(self, policy: Decoder, beside: Decoder) -> None:
        super().__init__(policy.model, policy.image_inputs)
        self._beside = beside

    @contextmanager
    def running(self) -> Generator[None]:
        with super().running(), self._beside.running():
            yield

    @property
    def keeps_samples(self) -> bool:
        return False

    def new_cache(
        self, prompt_lengths: Sequence[int], group_sizes: Sequence[int], max_tokens: int
    ) -> SharedPrefixCache:
        return _TwoCaches(prompt_lengths, group_sizes, max_tokens)

    def prefill(
        self, cache: SharedPrefixCache, requests: Sequence[RolloutRequest], batch: Sequence[int]
    ) -> tuple[Float[Tensor, "P V"], list[int]]:
        policy, places = super().prefill(cache, requests, batch)
        other, others_places = self._beside.prefill(cast(_TwoCaches, cache).other, requests, batch)
        if places != others_places:
            raise EngineError(
                "the two models of a mixture give different positions to what follows the same images; "
                "expected two models of one family"
            )
        weights = torch.tensor([requests[p].mixture for p in batch], device=policy.device)
        return mixed_logits(policy, other, weights), places

    def decode(
        self, tokens: Tensor, positions: Tensor, caches: Sequence[SharedPrefixCache], sampling: RowSampling
    ) -> Float[Tensor, "S V"]:
        policy = super().decode(tokens, positions, caches, sampling)
        others = [cast(_TwoCaches, cache).other for cache in caches]
        other = self._beside.decode(tokens, positions, others, sampling)
        return policy if sampling.mixture is None else mixed_logits(policy, other, sampling.mixture)

    def clear(self) -> None:
        super().clear()
        self._beside.clear()


class NativeMixtureEngine(NativeEngine):
    """`kv_cache_gib`: memory for keys and values of both models together, GiB.

    Raises ValueError when one of the models cannot be decoded, as NativeEngine does, and EngineError when
    they cannot be mixed.
    """

    _takes_mixtures = True

    def __init__(
        self,
        model: nn.Module,
        other: OtherModel,
        *,
        eos_token_ids: Sequence[int],
        kv_cache_gib: float = 4.0,
        max_tokens: int | None = None,
        image_inputs: ImageInputs | None = None,
    ) -> None:
        second = check_mixable(model, other, image_inputs)
        super().__init__(
            model,
            eos_token_ids=eos_token_ids,
            kv_cache_gib=kv_cache_gib,
            max_tokens=max_tokens,
            image_inputs=image_inputs,
        )
        # an engine of its own tests whether the other model can be decoded; then its decoder is ours
        alone = NativeEngine(
            second,
            eos_token_ids=(),
            kv_cache_gib=kv_cache_gib,
            max_tokens=max_tokens,
            image_inputs=other.image_inputs,
        )
        self._decoder = _MixtureDecoder(self._decoder, alone._decoder)
        self._bytes_per_token += alone._bytes_per_token
