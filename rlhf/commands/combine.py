"""`rlhf combine`: the weighted sum of LoRA adapters as one adapter, or merged into their model."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf.checkpoints import store as checkpoint
from rlhf.commands.paths import located
from rlhf.models.adapter_files import CONFIG, AdapterFile, Combined, combine, read_adapter
from rlhf.models.pretrained import ModelError, load_model, load_model_config, load_tokenizer
from rlhf.models.vision.processor import Reader
from rlhf.models.weight_files import TOKENIZERS
from rlhf.monitoring.run_folder import RunFolder

TOKENIZER = (*TOKENIZERS, "*token*.json", "merges.txt", "chat_template*", "*processor*.json")
"""Names of the files that a tokenizer or an image processor is saved in."""


def run_combine(named: Sequence[str], folder: str, *, merged: bool) -> Iterator[str]:
    """The lines to show. `named`: adapters with their weights, as `runs/a=0.5`; `merged`: write the model
    with the sum in its weights.

    Raises ModelError: a name is no adapter with a weight, or the adapters are of different models;
    CheckpointError: the folder holds something else than an earlier export.
    """
    target = Path(folder).expanduser()
    checkpoint.check_export(target)
    folders, weights = zip(*map(_named, named), strict=True)
    adapters = [read_adapter(f) for f in folders]
    bases = [_base(adapter) for adapter in adapters]
    for adapter, base in zip(adapters, bases, strict=True):
        if base != bases[0]:
            raise ModelError(
                f"{adapter.folder} is an adapter of {base}, but {adapters[0].folder} is one of {bases[0]}: "
                "adapters of one model can be combined"
            )
    total = Combined(bases[0], adapters[0].config, combine(adapters, weights))
    terms = " + ".join(f"{weight:g} {f}" for f, weight in zip(folders, weights, strict=True))
    if merged:
        _write_merged(bases[0], total, target)
        yield f"{terms} -> {target}: {bases[0]} with the sum merged into its weights"
        return
    checkpoint.export(total, _TokenizerOf(adapters[0].folder), target)
    rank = sum(adapter.rank for adapter in adapters)
    yield f"{terms} -> {target}: a LoRA adapter of rank {rank} on {bases[0]}, {len(total.layers)} layers"


def _named(text: str) -> tuple[Path, float]:
    """The folder and the weight of `FOLDER=WEIGHT`. Raises ModelError."""
    name, equals, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not equals or not name or not math.isfinite(weight):
        raise ModelError(f"{text}: expected an adapter and its weight, as runs/a=0.5")
    folder = Path(name).expanduser()
    if RunFolder(folder).config.is_file():
        if not (folder / "adapter" / CONFIG).is_file():
            raise ModelError(
                f"{folder} is a run without a folder adapter: it has not ended, or trained all weights; an "
                f"adapter of a checkpoint is written with: rlhf export {folder} FOLDER --adapter"
            )
        folder = folder / "adapter"
    return folder, weight


def _base(adapter: AdapterFile) -> str:
    """The adapter's model: the whole path of a folder that is there, else the name."""
    if not adapter.base:
        raise ModelError(f"{adapter.folder / CONFIG} does not name the model: set base_model_name_or_path")
    run = RunFolder(adapter.folder.parent)
    base = located(adapter.base, run.started_in() if run.config.is_file() else None)
    folder = Path(base).expanduser()
    return str(folder.resolve()) if folder.is_dir() else base


def _write_merged(path: str, adapter: Combined, target: Path) -> None:
    """Writes the model with the adapter in its weights, each rounded once. Raises ModelError."""
    stored = load_model_config(path).dtype
    dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    model = load_model(path, torch.device("cpu"), dtype)
    for layer, (down, up) in adapter.layers.items():
        try:
            weight = model.get_submodule(layer).get_parameter("weight")
        except AttributeError:
            raise ModelError(f"{path} has no layer {layer}, which the adapter changes") from None
        change = up @ down
        if adapter.config.get("fan_in_fan_out"):
            change = change.T
        weight.data = (weight.float() + change).to(dtype)
    checkpoint.export(model, Reader(path, load_tokenizer(path)), target)


@dataclass(frozen=True, slots=True)
class _TokenizerOf:
    """The tokenizer's files of a folder, which may have none."""

    folder: Path

    def save_pretrained(self, save_directory: str) -> None:
        for file in {file for pattern in TOKENIZER for file in self.folder.glob(pattern)}:
            shutil.copyfile(file, Path(save_directory) / file.name)
