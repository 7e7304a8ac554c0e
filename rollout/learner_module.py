"""What the engines that run the learner's own module share: switch it to sampling and back, take weights."""

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
"""A PreTrainedModel; the annotations of transformers are too incomplete for a strict check."""


def causal_model(module: nn.Module) -> Model:
    """The Hugging Face model itself, also inside a PEFT wrapper (its adapters are layers of that model)."""
    if "peft" in sys.modules:
        from peft import PeftModel

        if isinstance(module, PeftModel):
            module = module.get_base_model()
    if not isinstance(module, PreTrainedModel):
        raise ValueError(
            f"an embedded engine needs a Hugging Face PreTrainedModel, got {type(module).__name__}"
        )
    return module


@contextmanager
def sampling_mode(model: Model, attention: str | None) -> Generator[None]:
    """Evaluation mode, no gradients and the named attention; the learner finds its module as it left it.

    Not `inference_mode`: a module that keeps a tensor between forwards (rotary frequencies that adapt to
    the length) would hand the learner one that cannot be saved for backward.
    """
    training = [module for module in model.modules() if module.training]
    text = model.config.get_text_config()
    before = text._attn_implementation
    # a vision tower beside the language model keeps its own
    parts = [part for part in model.config.sub_configs if getattr(model.config, part) is text]

    def attend(name: str) -> None:
        model.set_attn_implementation(dict.fromkeys(parts, name) or name)

    model.eval()
    try:
        if attention is not None:
            attend(attention)
        with torch.no_grad():
            yield
    finally:
        if attention is not None:
            attend(before)
        for module in training:
            module.training = True


def take_weights(model: Model, source: WeightSource, version: int) -> SyncReport:
    """Copies every weight, unless `model` is the source's own module: then they are there already."""
    start = time.perf_counter()
    copied = 0
    if causal_model(source.module) is not model:
        copied = _copy(model, source)
    return SyncReport(version=version, seconds=time.perf_counter() - start, bytes=copied)


@torch.no_grad()
def _copy(model: Model, source: WeightSource) -> int:
    # with both names of a tied weight, which a source may give under either
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
