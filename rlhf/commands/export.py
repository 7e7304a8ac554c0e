"""`rlhf export`: writes the model of a checkpoint as a folder that transformers, vLLM and others load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from rlhf.checkpoints import store as checkpoint
from rlhf.checkpoints.stateful import CheckpointError
from rlhf.commands.model_source import find_source, load_weights
from rlhf.commands.paths import located
from rlhf.config.load import load_config
from rlhf.models.pretrained import load_tokenizer, trust
from rlhf.models.vision.processor import Reader


def run_export(name: str, folder: str, *, adapter: bool) -> Iterator[str]:
    """The lines to show. `adapter`: write the LoRA adapter alone, not merged into the base model.

    Raises ConfigError, ModelError or CheckpointError, also when the folder exists and is no earlier export.
    """
    source, target = find_source(name), Path(folder).expanduser()
    if source.checkpoint is None or source.config is None:
        found = "is a model already" if Path(name).expanduser().is_dir() else "is no folder here"
        raise CheckpointError(f"{name} {found}; rlhf export takes a run folder or a checkpoint folder")
    config = load_config(source.config)
    path = located(config.model.path, source.folder)
    section = config.model.model_copy(update={"path": path})
    if adapter and config.model.lora is None:
        raise CheckpointError(
            f"{name} has no adapter, because it trained all weights; export without --adapter"
        )
    checkpoint.check_export(target)
    if section.trust_remote_code:
        trust(path)
    tokenizer = load_tokenizer(path)
    reader = Reader(path, tokenizer)
    weights = load_weights(source, section, torch.device("cpu"), seed=config.seed)
    if adapter and weights.adapter is not None:
        checkpoint.export(weights.adapter, reader, target)
        yield f"{source.checkpoint} -> {target}: a LoRA adapter on {path}"
        return
    checkpoint.export(weights.model, reader, target)
    merged = "" if weights.adapter is None else ", its adapter merged into the weights"
    yield f"{source.checkpoint} -> {target}: a model of {config.model.dtype} weights{merged}"
