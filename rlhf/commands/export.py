"""`rlhf export`: a checkpoint as a folder that transformers, vLLM and others load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from rlhf.checkpoints import store as checkpoint
from rlhf.checkpoints.stateful import CheckpointError
from rlhf.commands.source import find_source, load_weights
from rlhf.config.load import load_config
from rlhf.models.pretrained import load_tokenizer
from rlhf.models.vision.processor import load_processor


def run_export(name: str, folder: str, *, adapter: bool) -> Iterator[str]:
    """The lines to show. `adapter`: the LoRA adapter alone, not merged into the weights it stands on.

    Raises ConfigError, ModelError or CheckpointError; an existing folder that is no earlier export is kept.
    """
    source, target = find_source(name), Path(folder).expanduser()
    if source.checkpoint is None or source.config is None:
        raise CheckpointError(f"{name} is a model already; rlhf export is for a run or a checkpoint of one")
    config = load_config(source.config)
    if adapter and config.model.lora is None:
        raise CheckpointError(f"{name} trained all weights, there is no adapter; export without --adapter")
    checkpoint.check_export(target)
    tokenizer = load_tokenizer(config.model.path)
    reader = load_processor(config.model.path, tokenizer) or tokenizer
    weights = load_weights(source, config.model, torch.device("cpu"), seed=config.seed)
    if adapter and weights.adapter is not None:
        checkpoint.export(weights.adapter, reader, target)
        yield f"{source.checkpoint} -> {target}: a LoRA adapter on {config.model.path}"
        return
    checkpoint.export(weights.model, reader, target)
    merged = "" if weights.adapter is None else ", its adapter merged into the weights"
    yield f"{source.checkpoint} -> {target}: a model of {config.model.dtype} weights{merged}"
