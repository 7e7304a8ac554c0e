"""How large a model is, counted on the model itself with weights that take no memory.

Weights and what the layers keep for their backward pass come from running the model's own code on the meta
device, where tensors have shapes and no contents. Nothing but its config.json is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.models.layers.recompute import memory_of, recomputing
from rlhf.models.layers.shared_prefix import register_attention
from rlhf.models.pretrained import empty_model, head_of, layer_classes, set_attention, text_settings
from rlhf.torch_typed import modules_by_name

COUNTED = "rlhf_counted"


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Of one model. Weights are counts, not bytes."""

    weights: int
    """All of them, tied ones once."""
    matrices: int
    """Those that every token is multiplied by, without embeddings and head; all experts of a mixture."""
    linear_sides: int
    """Inputs plus outputs of all linear layers but the head: weights of an adapter of rank 1."""
    head: int
    """Of the language-model head, tied or not; 0 without one."""
    largest_layer: int
    outside_layers: int
    """Embeddings, head, last norm: gathered together beside the layers where a model is in shards."""
    layers: int
    hidden: int
    vocabulary: int
    attended: int
    """Query heads x head size x layers: what a token pays for each token it attends to."""
    key_value_bytes: int
    """Of one token, in the type the model computes in."""
    kept_bytes: int | None
    """What the layers keep of one token for the backward pass; None: the model's code needs real tensors."""


def model_sizes(path: str, dtype: torch.dtype, *, head: bool = True) -> ModelSizes:
    """Of the model in a folder, computing in `dtype`; without `head` of the transformer alone.

    Raises ModelError as loading does.
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
    heads = settings["num_attention_heads"]
    size = settings.get("head_dim") or settings["hidden_size"] // heads
    depth = settings["num_hidden_layers"]
    of_layers = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    weights = sum(p.numel() for p in parameters)
    return ModelSizes(
        weights=weights,
        matrices=sum(p.numel() for p in parameters if p.dim() > 1 and p not in apart),
        linear_sides=sum(sum(m.weight.shape) for m in linears if m is not top),
        head=0 if top is None else top.weight.numel(),
        largest_layer=max(of_layers, default=0),
        outside_layers=weights - sum(of_layers),
        layers=depth,
        hidden=settings["hidden_size"],
        vocabulary=settings["vocab_size"],
        attended=depth * heads * size,
        key_value_bytes=2 * depth * (settings.get("num_key_value_heads") or heads) * size * dtype.itemsize,
        kept_bytes=kept_bytes(model.base_model),
    )


def kept_bytes(model: nn.Module, length: int = 16) -> int | None:
    """What a transformer on the meta device keeps of one token for its backward pass."""
    try:
        return kept_in_a_pass(model, length) // length
    except (NotImplementedError, RuntimeError):
        # such code asks for the contents of a tensor, to route tokens to experts for example
        return None


def kept_in_a_pass(model: nn.Module, length: int) -> int:
    """Bytes that one pass of a transformer over that many tokens keeps, weights excluded."""
    kept: dict[int, int] = {}
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        kept[memory_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    set_attention(model, COUNTED)
    token_ids = torch.zeros(1, length, dtype=torch.long, device=next(model.parameters()).device)
    with recomputing(keep):
        model(input_ids=token_ids, use_cache=False)
    ours = {memory_of(p) for p in model.parameters()}
    return sum(size for memory, size in kept.items() if memory not in ours)


class _KeptByAttention(torch.autograd.Function):
    """Keeps what every kernel in use keeps: queries, keys, values and output, no scores."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        query, _, value = inputs
        # tokens first, as the kernels write it: what reads it next needs no copy
        output = query.new_empty(*query.transpose(1, 2).shape[:-1], value.shape[-1])
        ctx.save_for_backward(*inputs, output)
        return output


def _counted(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    return cast(Any, _KeptByAttention).apply(query, key, value), None


register_attention(COUNTED, _counted)
