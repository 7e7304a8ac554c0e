"""Checkpoints that are whole or absent, and the final model in the Hugging Face layout.

    RUN/checkpoints/
        LATEST                  name of the newest one, for people and scripts
        step_000012/
            model.safetensors   one file for each mapping of tensors
            optimizer.safetensors
            state.json          everything else a run needs to go on
            manifest.json       written last: size and sha256 of each file, and its own sha256

A checkpoint is written in `step_000012.tmp-<pid>`, synced to the disk and renamed, so a run killed at any
moment leaves the one before. Neither safetensors nor a file system notices a flipped bit, so digests are
compared on every load. Nothing here unpickles.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from rlhf.files import sync, write_atomically

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
EXPORT_MARK = "export.json"

# one that is replaced by another of its step stays loadable under a second name until the new one is in place
_FOLDER = re.compile(r"step_(\d{6,})(\.replaced-\d+)?")
_UNFINISHED = re.compile(r"(step_\d{6,}|LATEST)\.tmp-\d+")


TensorFiles = Mapping[str, Mapping[str, Tensor]]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what its manifest says. The message names the file."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `save` was given."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    folder: Path,
    *,
    step: int,
    tensors: TensorFiles,
    state: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Writes `folder/step_<step>` and returns it; then removes all but the last `keep_last`.

    `tensors` has one mapping a file. Tensors must not share memory (save a tied weight once, under one name).
    `state` holds what JSON can hold: dicts with string keys, lists, strings, numbers, booleans, None.

    Raises CheckpointError: the disk is full or cannot be written; what was half written is removed, and the
    earlier checkpoints are as they were.
    """
    assert keep_last >= 1, keep_last
    for name, group in tensors.items():
        _assert_nothing_shared(name, group)
    _assert_json(state, "state")
    target = folder / f"step_{step:06d}"
    beside = folder / f"{target.name}.tmp-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        beside.mkdir()
        _write(beside, step, tensors, state)
        _put_in_place(beside, target)
        write_atomically(folder / "LATEST", target.name + "\n")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(_why_not_written(folder, step, tensors, error)) from error
    _prune(folder, step, keep_last)
    return target


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that verifies, or None. Each damaged one passed over is named in a warning."""
    for _, path in _found(folder):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning("%s; passed over for the one before", error)
            continue
        return path
    return None


def load(path: Path, *, device: str | torch.device) -> Checkpoint:
    """Reads a checkpoint, its tensors onto `device`.

    Raises CheckpointError with the file and what is wrong: missing, size or digest differs, unreadable.
    """
    manifest = verify(path)
    tensors = {
        name.removesuffix(".safetensors"): load_file(path / name, device=str(device))
        for name in manifest["files"]
        if name.endswith(".safetensors")
    }
    return Checkpoint(manifest["step"], tensors, json.loads((path / STATE).read_text()))


def verify(path: Path) -> dict[str, Any]:
    """Compares every file with the manifest, which is returned. Raises CheckpointError as `load` does."""
    manifest = _read_manifest(path / MANIFEST)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        size = file.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(f"{file}: size differs, {size} bytes where {expected['size']} were written")
        if _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: digest differs, its contents are not what was written")
    return manifest


@runtime_checkable
class Saves(Protocol):
    """A Hugging Face model or tokenizer."""

    def save_pretrained(self, save_directory: str) -> object: ...


def export(model: Saves, tokenizer: Saves, folder: Path) -> None:
    """Writes what `AutoModelForCausalLM.from_pretrained(folder)` loads; an earlier export there is replaced.

    Raises CheckpointError: the folder has other things in it, or cannot be written.
    """
    check_export(folder)
    beside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        model.save_pretrained(str(beside))
        tokenizer.save_pretrained(str(beside))
        write_atomically(beside / EXPORT_MARK, json.dumps({"versions": _versions()}, indent=1))
        for file in beside.rglob("*"):
            sync(file)
        _put_in_place(beside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"the model could not be exported to {folder}: {error}") from error


def check_export(folder: Path) -> None:
    """Raises CheckpointError when an export there would overwrite anything but an earlier export."""
    if folder.is_file() or (
        folder.exists() and any(folder.iterdir()) and not (folder / EXPORT_MARK).is_file()
    ):
        raise CheckpointError(
            f"{folder} is not empty and is no earlier export; nothing was overwritten, choose another folder"
        )


def _write(folder: Path, step: int, tensors: TensorFiles, state: Mapping[str, Any]) -> None:
    for name, group in tensors.items():
        file = folder / f"{name}.safetensors"
        save_file({key: t.detach().cpu().contiguous() for key, t in group.items()}, file)
        sync(file)
    write_atomically(folder / STATE, json.dumps(state))
    body = {
        "format": FORMAT,
        "step": step,
        "world_size": _world_size(),
        "versions": _versions(),
        "files": {f.name: {"size": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(folder.iterdir())},
    }
    write_atomically(folder / MANIFEST, _seal(body))


def _seal(body: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _read_manifest(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file}: missing, the checkpoint is incomplete")
    try:
        text = file.read_text(encoding="utf-8")
        manifest = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file}: unreadable JSON, {error}") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{file}: unreadable, an object was expected")
    body = cast(dict[str, Any], manifest)
    body.pop("sha256", None)
    # sealing again must give the very bytes, or some bit of the file is not what was written
    if _seal(body) != text:
        raise CheckpointError(f"{file}: digest differs")
    if body["format"] != FORMAT:
        raise CheckpointError(f"{file}: format {body['format']}, this version reads {FORMAT}")
    return body


def _put_in_place(beside: Path, target: Path) -> None:
    sync(beside)
    replaced = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    if target.exists():
        os.rename(target, replaced)
    os.rename(beside, target)
    sync(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _found(folder: Path) -> list[tuple[int, Path]]:
    """Finished checkpoints, newest first."""
    if not folder.is_dir():
        return []
    matches = [(m, path) for path in folder.iterdir() if (m := _FOLDER.fullmatch(path.name))]
    matches.sort(key=lambda match: (-int(match[0][1]), match[1].name))
    return [(int(m[1]), path) for m, path in matches]


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _prune(folder: Path, step: int, keep_last: int) -> None:
    """The one just written is good. Those of later steps belong to a future that the run has left."""
    kept: set[int] = set()
    for found_step, path in _found(folder):
        if found_step > step:
            logger.warning("%s is of a later step than the one just written; it is removed", path)
        elif found_step not in kept and len(kept) < keep_last:
            kept.add(found_step)
            continue
        shutil.rmtree(path, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _world_size() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "safetensors")}


def _assert_nothing_shared(file: str, tensors: Mapping[str, Tensor]) -> None:
    filled = {name: t for name, t in tensors.items() if t.numel()}
    spans = sorted((str(t.device), t.data_ptr(), _extent(t), name) for name, t in filled.items())
    for (device, start, extent, name), (next_device, next_start, _, next_name) in pairwise(spans):
        assert device != next_device or start + extent <= next_start, (
            f"{file}: {name} and {next_name} share memory; save one of them and tie them again after loading"
        )


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to behind the last one, gaps included."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _assert_json(value: Any, where: str) -> None:
    """What JSON would change without a word (a tuple, a key that is a number) is refused too."""
    match value:
        case dict():
            for key, item in cast(dict[Any, Any], value).items():
                assert isinstance(key, str), f"{where}: key {key!r} is no string"
                _assert_json(item, f"{where}[{key!r}]")
        case list():
            for i, item in enumerate(cast(list[Any], value)):
                _assert_json(item, f"{where}[{i}]")
        case _:
            plain = value is None or type(value) in (bool, int, float, str)
            assert plain, f"{where}: {type(value).__name__} is not JSON; a list, dict, string or number is"


def _why_not_written(folder: Path, step: int, tensors: TensorFiles, error: Exception) -> str:
    message = f"the checkpoint of step {step} could not be written to {folder}: {error}."
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error):
        needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        free = shutil.disk_usage(folder).free
        message += (
            f" It takes {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; make room or keep fewer."
        )
    return message + " Earlier checkpoints are as they were."
