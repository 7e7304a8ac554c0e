"""A trial without weights: a small copy of the model, with random ones, computes log-probs of packed groups.

Whether they are those of the model's own forward is decided by its code, not by its weights; so what
rlhf/models/self_test.py would find when the run has loaded the weights, `rlhf check` finds here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from accelerate import init_empty_weights  # pyright: ignore[reportMissingTypeStubs]
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.config.model import ModelConfig
from rlhf.models.loading import checked_policy, checked_trunk
from rlhf.models.pretrained import load_model_config, random_model
from rlhf.torch_typed import seeded

MOST = 200_000_000
"""Weights of the largest copy that is tried."""
LAYERS = 4
"""The most layers of a copy; the first of each kind are taken."""
SIZES = {"vocab_size": 512, "intermediate_size": 64, "moe_intermediate_size": 64, "depth": 2}
"""What is smaller in the copy, vision tower included, because nothing else depends on it."""
STATE = ("A_log", "conv")
"""Parts of the names of weights of state-space layers, which would not be stable if they were larger."""
WORDS = {
    "": "known when the weights are loaded: no small copy of the model can be made",
    "shared_prefix": "prompts are shared within a group",
    "packed": "sequences are packed, with a copy of the prompt for each",
    "padded": "sequences are padded",
}

log = logging.getLogger("rlhf.models.loading")


def try_packing(section: ModelConfig, writers: Sequence[str], critic: str | None, longest: int | None) -> str:
    """How groups of the model at `writers[0]` are packed: a line of `rlhf check`.

    `writers`: the policy and its references; `critic`: the model that a critic starts from, if it is not the
    policy; `longest`: the most tokens of prompt and completion together, if known. Raises
    ModelError: the run would refuse one of them, because even padded rows are not computed as its own forward
    does, or because it cannot do the layout that is asked for.
    """
    layouts: list[str] = []
    quiet, log.disabled = log.disabled, True  # the run itself will say why a layout cannot be done
    try:
        for path in writers:
            model = small_copy(path)
            layouts.append(
                "" if model is None else checked_policy(section, path, model, longest=longest).layout
            )
        if critic is not None and (trunk := small_copy(critic, head=False)) is not None:
            checked_trunk(critic, trunk, longest=longest)
    finally:
        log.disabled = quiet
    return WORDS[layouts[0]]


def small_copy(path: str, *, head: bool = True) -> PreTrainedModel | None:
    """A model of the same kind with a few layers and random weights, in float32 on the CPU.

    Without its `head`, a transformer alone. None: the kind cannot be made smaller in this way, or its own
    forward does not work with these sizes.
    """
    config = small_config(load_model_config(path))
    try:
        with init_empty_weights():
            size = sum(weight.numel() for weight in random_model(path, config, head=head).parameters())
        if size > MOST:
            return None
        with seeded(0), torch.no_grad():
            model: Any = random_model(path, config, head=head)
            _sharpen(model)
            out = model(input_ids=torch.arange(2, 9)[None], use_cache=False)[0]
    except Exception:  # the code of any model, with sizes that it was not made for
        return None
    return model if out.isfinite().all() else None


def _sharpen(model: PreTrainedModel) -> None:
    """Enlarges the matrices, so that attention is far from uniform and shows which tokens are seen."""
    embeddings: Any = model.get_input_embeddings()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and weight is not embeddings.weight and not any(part in name for part in STATE):
            weight.mul_(1 / (weight.std() * weight.shape[1] ** 0.5 + 1e-6))


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """The same settings with fewer layers, at least one of each kind, and smaller vocabulary and MLPs."""
    small = copy.deepcopy(config)
    text: Any = cast(Any, small).get_text_config()
    count: int = getattr(text, "num_hidden_layers", 0)
    named = cast(dict[str, Any], vars(text))
    lists = {name: cast(list[Any], value) for name, value in named.items() if isinstance(value, list)}
    by_layer = {name: of_each for name, of_each in lists.items() if len(of_each) == count}
    kinds = [str([of_each[i] for of_each in by_layer.values()]) for i in range(count)]
    first = sorted({kinds.index(kind) for kind in kinds})[:LAYERS]
    chosen = first if len(first) > 1 else range(count)[:2]
    text.num_hidden_layers = len(chosen)
    for name, of_each in by_layer.items():
        setattr(text, name, [of_each[i] for i in chosen])
    parts = [p for p in vars(small).values() if isinstance(p, PretrainedConfig) and p is not text]
    for part in (text, *parts):
        for name, size in SIZES.items():
            if isinstance(old := getattr(part, name, None), int):
                setattr(part, name, min(old, size))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(part, name, None) is not None:
                setattr(part, name, 0)
    return small
