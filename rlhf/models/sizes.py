"""Sizes of a model (weights, layers, activations), counted without loading its weights.

The numbers of weights, and of bytes that the layers keep for their backward pass, come from running the
model's own code on the meta device, where tensors have shapes but no contents. Only its config.json is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.models.attention import set_attention
from rlhf.models.layers.recompute import memory_of, recomputing
from rlhf.models.layers.shared_prefix import register_attention
from rlhf.models.pretrained import empty_model, head_of, layer_classes, text_settings
from rlhf.torch_typed import modules_by_name

COUNTED = "rlhf_counted"


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of one model. Weights are numbers of elements, not bytes."""

    weights: int
    """All weights; tied ones count once."""
    matrices: int
    """Weights of all matrices except embeddings and head; all experts of a mixture are included."""
    linear_sides: int
    """Inputs plus outputs of all linear layers except the head: the weights of a LoRA adapter of rank 1."""
    head: int
    """Weights of the language-model head, tied or not; 0 without one."""
    largest_layer: int
    outside_layers: int
    """Weights of embeddings, head and last norm: a sharded model gathers them together, beside the layers."""
    layers: int
    hidden: int
    vocabulary: int
    attended: int
    """Query heads x head size x layers: the cost of attention for each token that a token attends to."""
    key_value_bytes: int
    """Keys and values of one token in all layers, in the compute type."""
    kept_bytes: int | None
    """Bytes per token that the layers keep for the backward pass; None: only real tensors would tell."""


def model_sizes(path: str, dtype: torch.dtype, *, head: bool = True) -> ModelSizes:
    """Sizes of the model at `path` with compute type `dtype`; without `head`, of its transformer alone.

    Raises ModelError as `load_model_config` does.
    """
    model = cast(Any, empty_model(path, dtype, head=head)).to("meta")
    settings = text_settings(model.config)
    names = layer_classes(model)
    layers = [m for m in modules_by_name(model).values() if type(m).__name__ in names]
    linears = [m for m in modules_by_name(model).values() if isinstance(m, nn.Linear)]
    top = cast(Any, head_of(model)) if head else None
    embedding = model.get_input_embeddings().weight
    apart = {embedding} if top is None else {embedding, top.weight}
    parameters: list[nn.Parameter] = list(model.parameters())
    # none in a model without attention
    heads = int(settings.get("num_attention_heads") or 0)
    size = int(settings.get("head_dim") or settings["hidden_size"] // max(heads, 1))
    depth = settings["num_hidden_layers"]
    layer_sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    weights = sum(p.numel() for p in parameters)
    return ModelSizes(
        weights=weights,
        matrices=sum(p.numel() for p in parameters if p.dim() > 1 and p not in apart),
        linear_sides=sum(sum(m.weight.shape) for m in linears if m is not top),
        head=0 if top is None else top.weight.numel(),
        largest_layer=max(layer_sizes, default=0),
        outside_layers=weights - sum(layer_sizes),
        layers=depth,
        hidden=settings["hidden_size"],
        vocabulary=settings["vocab_size"],
        attended=depth * heads * size,
        key_value_bytes=2 * depth * (settings.get("num_key_value_heads") or heads) * size * dtype.itemsize,
        kept_bytes=kept_bytes(model.base_model),
    )


def kept_bytes(model: nn.Module, length: int = 16) -> int | None:
    """Bytes per token that a transformer on the meta device keeps for backward; None: not countable."""
    try:
        return kept_in_a_pass(model, length) // length
    except Exception:
        # the model's code reads the contents of a tensor, for example to route tokens to experts, or fails in
        # another way on tensors without contents
        return None


def kept_in_a_pass(model: nn.Module, length: int) -> int:
    """Bytes that one forward pass of a transformer over `length` tokens keeps, without the weights."""
    kept: dict[int, int] = {}
    # keeps the tensors alive, so that no two of them ever have the same memory
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        kept[memory_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    set_attention(model, COUNTED)
    token_ids = torch.zeros(1, length, dtype=torch.long, device=next(model.parameters()).device)
    with recomputing(keep):
        model(input_ids=token_ids, use_cache=False)
    weights = {memory_of(p) for p in model.parameters()}
    return sum(size for memory, size in kept.items() if memory not in weights)


class _KeptByAttention(torch.autograd.Function):
    """Attention without computation; it keeps what our kernels keep: queries, keys, values and output."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        query, _, value = inputs
        # laid out with the tokens first, as the kernels write it, so that the next layer needs no copy to
        # count
        output = query.new_empty(*query.transpose(1, 2).shape[:-1], value.shape[-1])
        ctx.save_for_backward(*inputs, output)
        return output


def _counted(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    return cast(Any, _KeptByAttention).apply(query, key, value), None


register_attention(COUNTED, _counted)
