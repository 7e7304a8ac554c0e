"""The geometric mixture of two models, which Nash-MD and IPO-MD sample from, and its engine by full forwards.

    log q(v | x, y<t) = (1 - b) log p(v | x, y<t) + b log r(v | x, y<t) - log Z(x, y<t)

with policy p, another model r (the reference) and b = `RolloutRequest.mixture` (Nash-MD, arXiv:2312.00886;
IPO-MD, arXiv:2403.08635).

1. The mixture is normalised token by token. The mixture of whole sequences, which the theory speaks of, has
   one normaliser per prompt and cannot be sampled from left to right; both papers sample as here.
2. The papers mix log-softmaxes. Logits differ from these by a constant per row, which Z removes: they are
   mixed as they are.
3. Temperature divides the mixture; a mixture of two models that each have this temperature is the same.
   Truncation leaves out tokens of the mixture.

An engine reports log q of each token. `HFMixtureEngine` is the specification that the fast engine,
`native/mixture.py`, is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rlhf.rollout.engine import EngineError, ImageInputs
from rlhf.rollout.hf import Draw, HFEngine
from rlhf.rollout.learner_module import Model, causal_model, exact_attention, sampling_mode
from rlhf.rollout.sampling import RowSampling


@dataclass(frozen=True, slots=True)
class OtherModel:
    """The model beside the policy in a mixture: `OtherModel(reference.model)`, a module of its own.

    With a LoRA adapter it is `OtherModel(adapter.base_model)`, which has the policy's frozen weights without
    a copy of them.
    """

    module: nn.Module
    image_inputs: ImageInputs | None = None
    """As for the policy; both or neither."""


def mixed_logits(
    policy: Float[Tensor, "S V"], other: Float[Tensor, "S V"], weight: Float[Tensor, " S"]
) -> Float[Tensor, "S V"]:
    """Logits of the mixture, fp32; with weight 0 bit for bit the policy's, with weight 1 the other's."""
    policy, other, weight = policy.float(), other.float(), weight[:, None]
    mixed = (1 - weight) * policy + weight * other
    # 0 times the logit -inf, of a token that one model cannot sample, is NaN
    return torch.where(weight == 0, policy, torch.where(weight == 1, other, mixed))


def check_mixable(model: nn.Module, other: OtherModel, image_inputs: ImageInputs | None) -> Model:
    """The causal model of `other`, checked against `model`.

    Raises EngineError: sharded, on another device, another vocabulary, or one without image inputs.
    """
    first, second = causal_model(model), causal_model(other.module)
    for module, name in ((first, "policy"), (second, "other model")):
        if any(isinstance(part, FSDPModule) for part in module.modules()):
            raise EngineError(
                f"a mixture is decoded from whole weights, but the {name} is sharded over ranks; set "
                "distributed.mode=replicated, or sample from one model"
            )
    sizes = [
        (m.get_input_embeddings().weight.shape[0], m.get_output_embeddings().weight.shape[0])
        for m in (first, second)
    ]
    if sizes[0] != sizes[1]:
        raise EngineError(
            "a mixture needs two models with the same vocabulary, but the policy has "
            f"{sizes[0][1]} logits for {sizes[0][0]} token ids, the other model {sizes[1][1]} logits for "
            f"{sizes[1][0]} token ids"
        )
    if first.device != second.device:
        raise EngineError(
            f"a mixture needs both models on one device, but the policy is on {first.device}, the other "
            f"model on {second.device}"
        )
    if (image_inputs is None) != (other.image_inputs is None):
        without = "policy" if image_inputs is None else "other model"
        raise EngineError(f"a mixture reads images with both models, but the {without} has no image inputs")
    return second


class _MixedDraw(Draw):
    """Draws from the mixture; `other` gives the other model's logits `[S, V]` after the tokens `[S, T]`."""

    def __init__(self, sampling: RowSampling, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__(sampling)
        self._other = other

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if self.sampling.mixture is not None:
            scores = mixed_logits(scores, self._other(input_ids), self.sampling.mixture)
        return super().__call__(input_ids, scores)


class HFMixtureEngine(HFEngine):
    """`hf` with the other model's logits mixed in, which cost a forward over the whole sequence per token.

    Raises EngineError for models that cannot be mixed, and for image inputs.
    """

    _takes_mixtures = True

    def __init__(
        self,
        model: nn.Module,
        other: OtherModel,
        *,
        eos_token_ids: Sequence[int],
        image_inputs: ImageInputs | None = None,
    ) -> None:
        if image_inputs is not None:
            # a whole forward would take a placeholder that was sampled for one more image
            raise EngineError("the engine hf samples no mixtures of models that read images; expected native")
        self._other = check_mixable(model, other, None)
        super().__init__(model, eos_token_ids=eos_token_ids)

    def _draw(self, sampling: RowSampling) -> Draw:
        return _MixedDraw(sampling, self._other_logits)

    def _other_logits(self, token_ids: Tensor) -> Tensor:
        model = self._other
        with sampling_mode(model, exact_attention(model)):
            mask = torch.ones_like(token_ids)
            return model(input_ids=token_ids, attention_mask=mask, use_cache=False).logits[:, -1]
