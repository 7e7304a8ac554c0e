"""Whether a model folder is whole: pointers of Git LFS, lost or damaged files, weights that no file has."""

from __future__ import annotations

import difflib
import importlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
from safetensors import SafetensorError

from rlhf.files import LFS, is_pointer

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "*vocab*", "*.tiktoken", "tekken.json", "spiece.model")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
POINTER_BYTES = 1024
"""A pointer of Git LFS is smaller than this."""
# its annotations are too incomplete for a strict check
_safe_open: Any = safetensors.safe_open


class ModelError(ValueError):
    """The model cannot be loaded, or not be trained with these settings. The message says why."""


def check_small_files(folder: Path) -> None:
    """Raises ModelError where a config or a tokenizer is a pointer of Git LFS."""
    for pattern in ("*.json", *TOKENIZERS):
        for file in sorted(folder.glob(pattern)):
            if file.is_file() and len(LFS) <= file.stat().st_size < POINTER_BYTES:
                _check_no_pointer(file)


def damaged_json(folder: Path) -> str | None:
    """The beginning of a sentence that names the JSON file of a tokenizer which is no JSON; None: all are."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        file = folder / name
        if file.is_file():
            try:
                json.loads(file.read_bytes())
            except (ValueError, RecursionError):
                return f"{file} is damaged or not all of it is there, fetch it again"
    return None


def check_files(folder: Path) -> None:
    """Raises ModelError, which names the file, where weights of a model folder are lost, cut or not fetched.

    Of each file only the header is read.
    """
    files = list(_weight_files(folder))
    if not files:
        raise ModelError(f"{folder} has no weights: none of {', '.join(WEIGHTS)} is there")
    for file in files:
        _check_no_pointer(file)
        size = file.stat().st_size
        damaged = f"{file} is damaged or not all of it is there ({size} bytes"
        if file.suffix == ".safetensors":
            try:
                with _safe_open(str(file), framework="pt"):
                    pass
            except SafetensorError as error:
                raise ModelError(f"{damaged}: {error}): fetch it again") from None
        # torch's format is a zip archive, whose index is at the end; an older one is a plain pickle
        elif _begins(file, b"PK") and not zipfile.is_zipfile(file):
            raise ModelError(f"{damaged}, and the end of its archive is missing): fetch it again")


def _weight_files(folder: Path) -> Iterator[Path]:
    """The files that transformers reads a model's weights from.

    Raises ModelError: an index names files that are not there.
    """
    for kind in ("model.safetensors", "pytorch_model.bin"):
        single, index = folder / kind, folder / f"{kind}.index.json"
        if single.is_file():
            yield single
            return
        if index.is_file():
            names = sorted(set(_weight_map(index).values()))
            lost = [name for name in names if not (folder / name).is_file()]
            if lost:
                raise ModelError(
                    f"{index} names {len(names)} files of weights, but {len(lost)} of them are not there: "
                    f"{', '.join(lost[:3])}; fetch what is missing"
                )
            yield from (folder / name for name in names)
            return
    # other names, as those of a custom checkpoint: only their presence is known
    yield from (file for pattern in WEIGHTS for file in sorted(folder.glob(pattern)))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: Any = json.loads(index.read_text(encoding="utf-8"))
        return cast(dict[str, str], found["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} is no index of weights ({error!r}): fetch it again") from None


def _begins(file: Path, mark: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(mark)) == mark


def _check_no_pointer(file: Path) -> None:
    if is_pointer(file):
        raise ModelError(f"{file} is a pointer of Git LFS, not the file itself: fetch it with git lfs pull")


def check_report(path: str, report: Mapping[str, Any]) -> None:
    """Raises ModelError where transformers has loaded a model with weights that its files do not have.

    transformers fills them with random numbers. `report`: what it returns for `output_loading_info`. Tied
    weights, which files hold once, are not among its missing keys.
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        raise ModelError(
            f"{path}: its files lack {len(missing)} of the model's weights ({_first(missing)}), which would "
            f"be random{_hint(missing[0], unexpected)}"
        )
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"{path}: {name} is {list(stored)} in its files, but {list(wanted)} by config.json; do the two "
            "belong to the same model?"
        )


def _hint(missing: str, unexpected: list[str]) -> str:
    for name in unexpected:
        if name.endswith(f".{missing}"):
            prefix = name.removesuffix(missing)
            return (
                f"; they have it as {name}: save the weights without the prefix {prefix}, which "
                "torch.compile or another wrapper has added"
            )
    return f"; they have others that the model does not know ({_first(unexpected)})" if unexpected else ""


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def read_json(file: Path) -> dict[str, Any]:
    """The settings in a JSON file. Raises ModelError: it is damaged, or holds something else."""
    try:
        read: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {error}") from None
    if not isinstance(read, dict):
        raise ModelError(f"{file} must hold an object, got {type(read).__name__}")
    return cast(dict[str, Any], read)


def check_json(file: Path) -> None:
    """Raises ModelError where a local config.json is damaged, or names an unknown kind of model."""
    if not file.is_file():
        return
    settings = read_json(file)
    known: Any = importlib.import_module("transformers.models.auto.configuration_auto")
    kind: Any = settings.get("model_type")
    kinds = list[str](known.CONFIG_MAPPING_NAMES)
    if kind not in kinds and "auto_map" not in settings:
        near = difflib.get_close_matches(str(kind), kinds, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ModelError(f"{file} is of a model_type {kind!r}, which this transformers does not know{hint}")


def base_of(adapter: Path) -> str:
    """The model that an adapter is for, as its adapter_config.json says."""
    try:
        found: Any = json.loads(adapter.read_text(encoding="utf-8"))
        return str(found["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError):
        return "a model that it does not name"
