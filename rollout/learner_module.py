"""For engines that run the learner's own module: switch it to sampling and back, and copy weights."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.rollout.engine import SyncReport, WeightSource

Model = Any
"""A PreTrainedModel; the annotations of transformers are too incomplete for a strict type check."""


ONLY_EAGER = "tandem_only_eager"


def causal_model(module: nn.Module) -> Model:
    """The Hugging Face model, without its PEFT wrapper if it has one (adapters stay in its layers)."""
    if "peft" in sys.modules:
        from peft import PeftModel

        if isinstance(module, PeftModel):
            module = module.get_base_model()
    if not isinstance(module, PreTrainedModel):
        raise ValueError(
            f"an embedded engine needs a Hugging Face PreTrainedModel, got {type(module).__name__}"
        )
    return module


def exact_attention(model: Model) -> str:
    """The fastest registered attention that computes what the model defines: "sdpa", else "eager".

    transformers' "sdpa" leaves out a soft cap of the scores. With some models it computes something else for
    other reasons, which a test finds: they are marked by `only_eager`.
    """
    if ONLY_EAGER in vars(model):
        return "eager"
    capped = model.config.get_text_config().to_dict().get("attn_logit_softcapping")
    return "sdpa" if model._supports_sdpa and not capped else "eager"


def only_eager(model: Model) -> None:
    """Marks a model whose "sdpa" does not compute what the model defines."""
    vars(model)[ONLY_EAGER] = True


@contextmanager
def sampling_mode(model: Model, attention: str) -> Generator[None]:
    """Evaluation mode, no gradients and the named attention; the module is restored at the end.

    It uses `no_grad`, not `inference_mode`: a module that keeps a tensor between forwards (such as rotary
    frequencies that adapt to the length) would otherwise keep one that cannot be saved for backward.
    """
    training = [module for module in model.modules() if module.training]
    text = model.config.get_text_config()
    before = text._attn_implementation
    # a vision tower beside the language model keeps its own attention
    text_configs = [name for name in model.config.sub_configs if getattr(model.config, name) is text]

    def attend(name: str) -> None:
        model.set_attn_implementation(dict.fromkeys(text_configs, name) or name)

    model.eval()
    try:
        attend(attention)
        with torch.no_grad():
            yield
    finally:
        attend(before)
        for module in training:
            module.training = True


def take_weights(model: Model, source: WeightSource, version: int) -> SyncReport:
    """Copies all weights, unless `model` is the source's own module. Raises ValueError on a mismatch."""
    start = time.perf_counter()
    copied = 0
    if causal_model(source.module) is not model:
        copied = _copy(model, source)
    return SyncReport(version=version, seconds=time.perf_counter() - start, bytes=copied)


@torch.no_grad()
def _copy(model: Model, source: WeightSource) -> int:
    # the state dict has both names of a tied weight; a source may send it under either
    own = model.state_dict(keep_vars=True)
    missing = {id(parameter): name for name, parameter in model.named_parameters()}
    copied = 0
    for name, tensor in source.named_tensors():
        if name not in own:
            raise ValueError(f"the learner sends weight {name!r}, which {type(model).__name__} does not have")
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"weight {name!r} is {tuple(tensor.shape)} in the learner and {tuple(own[name].shape)} "
                "in the engine"
            )
        own[name].copy_(tensor)
        missing.pop(id(own[name]), None)
        copied += own[name].nbytes
    if missing:
        raise ValueError(
            f"the learner sent no weight for {sorted(missing.values())[:3]} ({len(missing)} in all)"
        )
    return copied
