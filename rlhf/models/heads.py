"""Heads on hidden states: of a language model, of a critic or a reward model, and the gate of scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import torch as _safetensors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rlhf.kernels.token_stats import TokenStats, token_stats, whole
from rlhf.models.pretrained import SCORED_AT_END, ModelError, head_of, text_settings
from rlhf.models.truncated_logprobs import HeadInputs, candidate_logprobs, missing_statistics, with_candidates
from rlhf.tensors.candidates import Candidates

# their annotations are incomplete
_files: Any = _safetensors


@dataclass(frozen=True, slots=True)
class Head:
    """The language-model head: logits are `softcap(scale * (h W^T + b))`."""

    module: nn.Linear
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """The head of `model`, with the scale and soft cap of its config. Raises ModelError: not linear."""
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
        num_targets: int | None = None,
        **reference: Any,
    ) -> TokenStats:
        """Statistics `[N]` of `targets` `[N]`, given the states `hidden` `[N, H]` that predict them.

        They are 0 where a target is `IGNORED`; `num_targets` is the number of the others, None: all. `want`
        and `reference` (the `ref_...` arguments, for log-probs and KL of a second model) are those of
        `token_stats`. Where a token has `candidates`, its log-probs are renormalised over them.
        """
        weight, bias = whole(self.module.weight), self.module.bias
        scaling: Any = {"temperature": temperature, "softcap": self.softcap, "logit_scale": self.scale}
        inputs: dict[str, HeadInputs] = {"logprob": (hidden, weight, bias)}
        if reference:
            inputs["ref_logprob"] = reference["ref_hidden"], reference["ref_weight"], reference["ref_bias"]
        found = candidate_logprobs(candidates, want, inputs, scaling)
        statistics = TokenStats()
        # giving the number spares the host the wait for a GPU that counts them
        count = len(targets) if num_targets is None else num_targets
        if missing := missing_statistics(want, found, candidates, count):
            statistics = token_stats(
                hidden,
                weight,
                targets,
                bias=bias,
                want=missing,
                num_unmasked=count,
                **scaling,
                **reference,
            )
        return with_candidates(statistics, found, candidates)

    def beside(self, policy: Head, hidden: Tensor) -> dict[str, Any]:
        """The `ref_...` arguments of `statistics` of the head `policy`: those of this head and its `hidden`.

        `token_stats` scales both models alike, so a difference of the scales goes into the hidden states.
        Rows that this head has beyond the policy's vocabulary are left out, and its distribution is
        renormalised: models of one family pad the same vocabulary to different sizes. Raises ModelError: this
        head has fewer rows, or caps its logits otherwise.
        """
        weight, bias = whole(self.module.weight), cast("Tensor | None", self.module.bias)
        rows = len(policy.module.weight)
        if len(weight) < rows or self.softcap != policy.softcap:
            raise ModelError(
                f"the reference's head has {len(weight)} tokens and the soft cap {self.softcap}, the "
                f"policy's {rows} and {policy.softcap}: their distributions cannot be compared"
            )
        factor = self.scale / policy.scale
        if factor != 1:
            hidden, bias = hidden * factor, None if bias is None else bias * factor
        return {
            "ref_hidden": hidden,
            "ref_weight": weight[:rows],
            "ref_bias": None if bias is None else bias[:rows],
        }

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[n, V]` of the states `hidden` `[n, H]`, in float32, at temperature 1."""
        weight = whole(self.module.weight)
        logits = (self.scale * F.linear(hidden, weight, self.module.bias)).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def value_head(model: nn.Module, weight: Tensor | None, device: torch.device) -> nn.Linear:
    """A linear head without bias: K scores with the given `weight` `[K, H]`, or one value, at zero."""
    size = cast(int, text_settings(cast(Any, model).config)["hidden_size"])
    head = nn.Linear(size, 1 if weight is None else len(weight), bias=False, device=device)
    with torch.no_grad():
        head.weight.zero_() if weight is None else head.weight.copy_(weight)
    return head


def scores(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Outputs `[N, K]` of a value or score head, in float32 (in float64 for float64 hidden states)."""
    precision = torch.promote_types(hidden.dtype, torch.float32)
    return F.linear(hidden.to(precision), head.weight.to(precision))


class Gate(nn.Module):
    """How much each of K scores counts, from the hidden state at the end of the prompt.

    The gating network of ArmoRM (arXiv:2406.12845 section 2.3): an MLP whose K outputs z become
    scale * softmax(z / temperature), with a scale that is learned and starts at 1; the weights of a prompt
    sum to the scale.
    """

    def __init__(self, size: int, num_scores: int, width: int, layers: int, temperature: float) -> None:
        """`size`: of a hidden state; `layers`: hidden layers of `width` units with ReLU."""
        super().__init__()
        sizes = [size, *[width] * layers]
        hidden: list[nn.Module] = []
        for before, behind in pairwise(sizes):
            hidden += [nn.Linear(before, behind), nn.ReLU()]
        self.network = nn.Sequential(*hidden, nn.Linear(sizes[-1], num_scores))
        self.scale = nn.Parameter(torch.ones(1))
        self.temperature = temperature
        shape = {"width": width, "layers": layers, "temperature": temperature}
        self.entries: Mapping[str, Any] = {**SCORED_AT_END, "gate": shape}
        """Entries of the config of a model that is saved with this gate."""

    def forward(self, prompts: Tensor) -> Tensor:
        """Weights `[P, K]` from the states `[P, H]` at the ends of prompts."""
        logits: Tensor = self.network(prompts)
        return self.scale * (logits / self.temperature).softmax(-1)

    def save(self, folder: str | Path) -> None:
        """Writes the weights beside those of the model that it belongs to."""
        _files.save_file(self.state_dict(), Path(folder) / GATE)

    @classmethod
    def load(cls, folder: str | Path, config: Any, device: torch.device) -> Gate | None:
        """The gate of the saved model with this config; None: it has none. Raises ModelError: it is lost."""
        shape: dict[str, Any] | None = config.to_dict().get("gate")
        if shape is None:
            return None
        file = Path(folder).expanduser() / GATE
        if not file.is_file():
            raise ModelError(
                f"{folder} lacks the file {GATE}, the weights of its gate: copy the whole folder"
            )
        gate = cls(text_settings(config)["hidden_size"], config.num_labels, **shape)
        gate.load_state_dict(_files.load_file(file))
        return gate.to(device)


GATE = "gate.safetensors"
"""The file of a gate in the folder of a saved model."""
