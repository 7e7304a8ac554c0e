"""What turns hidden states into numbers: the language-model head, and the head of values or scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rlhf.kernels.token_stats import TokenStats, token_stats, whole
from rlhf.models.pretrained import ModelError, head_of, text_settings
from rlhf.models.truncated_logprobs import Side, among_candidates, merged, still_wanted
from rlhf.types import Candidates


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
        candidates: Candidates | None = None,
        **against: Any,
    ) -> TokenStats:
        """`token_stats` under this head; `against`: the `ref_...` arguments of another model.

        Log-probs among the `candidates` tokens, where these are known.
        """
        weight, bias = whole(self.module.weight), self.module.bias
        scaling: Any = {"temperature": temperature, "softcap": self.softcap, "logit_scale": self.scale}
        sides: dict[str, Side] = {"logprob": (hidden, weight, bias)}
        if against:
            sides["ref_logprob"] = against["ref_hidden"], against["ref_weight"], against["ref_bias"]
        found = among_candidates(candidates, want, sides, scaling)
        statistics = TokenStats()
        if missing := still_wanted(want, found, candidates):
            # all of them are tokens: told so, the host need not wait for a GPU that counts them
            statistics = token_stats(
                hidden,
                weight,
                targets,
                bias=bias,
                want=missing,
                num_unmasked=len(targets),
                **scaling,
                **against,
            )
        return merged(statistics, found, candidates)


def value_head(model: nn.Module, weight: Tensor | None, device: torch.device) -> nn.Linear:
    """A linear map from hidden states without bias: that of a reward model, or zeros to one value."""
    size = cast(int, text_settings(cast(Any, model).config)["hidden_size"])
    head = nn.Linear(size, 1 if weight is None else len(weight), bias=False, device=device)
    with torch.no_grad():
        head.weight.zero_() if weight is None else head.weight.copy_(weight)
    return head


def scores(head: nn.Linear, hidden: Tensor) -> Tensor:
    """`[N, K]` in float32, or in float64 where the model has it."""
    precision = torch.promote_types(hidden.dtype, torch.float32)
    return F.linear(hidden.to(precision), head.weight.to(precision))
