"""Checkpoints that are whole or absent, and the final model in the Hugging Face layout.

    RUN/checkpoints/
        LATEST                  name of the newest one, for people and scripts
        step_000012/
            policy.model.safetensors                one file for each mapping of tensors
            policy.optimizer.rank00003.safetensors  the rows that rank 3 holds of sharded ones
            state.json          everything else a run needs to go on
            manifest.json       written last: size and sha256 of each file, and its own sha256

A checkpoint is written in `step_000012.tmp-<token>` (saver.py), synced to the disk and renamed, so a run
killed at any moment leaves the one before. Neither safetensors nor a file system notices a flipped bit, so
digests are compared on every load. Nothing here unpickles: torch's own distributed checkpoints would (their
`.metadata` is a pickle), so a file of shards says itself, in its safetensors header, which rows of which
tensor it has, and any number of ranks reads the rows it needs out of files that any other number has written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

from rlhf.checkpoints.stateful import CheckpointError
from rlhf.checkpoints.tensor_files import ROWS, SavedTensors, TensorFile
from rlhf.files import sync, write_atomically

logger = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"
STATE = "state.json"
EXPORT_MARK = "export.json"

# one that is replaced by another of its step stays loadable under a second name until the new one is in place
_FOLDER = re.compile(r"step_(\d{6,})(\.replaced-\d+)?")
_UNFINISHED = re.compile(r"(step_\d{6,}|LATEST)\.tmp-(\w+)")
_TENSORS = re.compile(r"(.+?)(\.rank\d{5})?\.safetensors")


Entries = dict[str, dict[str, Any]]
"""Size and digest of each file."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was saved."""

    tensors: dict[str, SavedTensors]
    state: dict[str, Any]


def unfinished(folder: Path, step: int, token: str) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return folder / f"{_name(step)}.tmp-{token}"


def write_files(folder: Path, files: Iterable[TensorFile], state: Mapping[str, Any] | None) -> Entries:
    """Writes one rank's files and the state, if it is this rank's to write; their sizes and digests."""
    names: list[str] = []
    for file in files:
        metadata = {ROWS: json.dumps(file.rows)} if file.rows else None
        save_file(file.tensors, folder / file.name, metadata)
        sync(folder / file.name)
        names.append(file.name)
    if state is not None:
        write_atomically(folder / STATE, json.dumps(state))
        names.append(STATE)
    paths = [folder / name for name in names]
    return {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def finish(beside: Path, *, step: int, entries: Entries, world_size: int, score: float | None) -> None:
    """Writes the manifest and puts the checkpoint in its place."""
    body = {
        "format": FORMAT,
        "step": step,
        "score": score,
        "world_size": world_size,
        "versions": _versions(),
        "files": entries,
    }
    write_atomically(beside / MANIFEST, _seal(body))
    target = beside.parent / _name(step)
    _put_in_place(beside, target)
    write_atomically(beside.parent / "LATEST", target.name + "\n")


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that verifies, or None. Each damaged one passed over is named in a warning."""
    for path in candidates(folder):
        try:
            verify(path)
        except CheckpointError as error:
            warn_passed_over(error)
            continue
        return path
    return None


def candidates(folder: Path) -> list[Path]:
    """Checkpoints that were finished, newest first; whether they are as they were written, `verify` says."""
    return [path for _, path in _found(folder)]


def warn_passed_over(error: CheckpointError | str) -> None:
    logger.warning("%s; passed over for the one before", error)


def load(path: Path, *, device: str | torch.device) -> Checkpoint:
    """Reads a checkpoint, its tensors onto `device`.

    Raises CheckpointError with the file and what is wrong: missing, size or digest differs, unreadable.
    """
    verify(path)
    return opened(path, device=device)


def opened(path: Path, *, device: str | torch.device) -> Checkpoint:
    """A checkpoint that has been verified."""
    manifest = _read_manifest(path / MANIFEST)
    files: dict[str, list[Path]] = {}
    for name in manifest["files"]:
        if match := _TENSORS.fullmatch(name):
            files.setdefault(match[1], []).append(path / name)
    tensors = {name: SavedTensors(paths, device) for name, paths in files.items()}
    return Checkpoint(tensors, json.loads((path / STATE).read_text()))


def verify(path: Path, *, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Compares the files with the manifest, which is returned. Raises CheckpointError as `load` does.

    Of `parts` ranks, each may read a part of the files.
    """
    manifest = _read_manifest(path / MANIFEST)
    for name, expected in sorted(manifest["files"].items())[part::parts]:
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


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _found(folder: Path) -> list[tuple[int, Path]]:
    """Finished checkpoints, newest first."""
    if not folder.is_dir():
        return []
    matches = [(m, path) for path in folder.iterdir() if (m := _FOLDER.fullmatch(path.name))]
    matches.sort(key=lambda match: (-int(match[0][1]), match[1].name))
    return [(int(m[1]), path) for m, path in matches]


def remove_leftovers(folder: Path, token: str) -> None:
    """Of saves that a kill has ended; those of `token` are under way."""
    for path in folder.iterdir():
        if (match := _UNFINISHED.fullmatch(path.name)) and match[2] != token:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def prune(folder: Path, step: int, *, keep_last: int, keep_best: int) -> None:
    """The one just written is good. Those of later steps belong to a future that the run has left."""
    kept = _best(folder, keep_best)
    last: set[int] = set()
    for found_step, path in _found(folder):
        if found_step > step:
            logger.warning("%s is of a later step than the one just written; it is removed", path)
        elif found_step not in last and len(last) < keep_last:
            last.add(found_step)
            continue
        elif path in kept:
            continue
        shutil.rmtree(path, ignore_errors=True)


def _best(folder: Path, count: int) -> set[Path]:
    """Those with the highest scores, of equal ones the newest; a damaged one has none."""
    scored: list[tuple[float, int, Path]] = []
    for step, path in _found(folder) if count else ():
        with suppress(CheckpointError):
            score = _read_manifest(path / MANIFEST)["score"]
            if score is not None:
                scored.append((score, step, path))
    return {path for _, _, path in sorted(scored, reverse=True)[:count]}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "safetensors")}


def assert_json(value: Any, where: str) -> None:
    """What JSON would change without a word (a tuple, a key that is a number) is refused too."""
    match value:
        case dict():
            for key, item in cast(dict[Any, Any], value).items():
                assert isinstance(key, str), f"{where}: key {key!r} is no string"
                assert_json(item, f"{where}[{key!r}]")
        case list():
            for i, item in enumerate(cast(list[Any], value)):
                assert_json(item, f"{where}[{i}]")
        case _:
            plain = value is None or type(value) in (bool, int, float, str)
            assert plain, f"{where}: {type(value).__name__} is not JSON; a list, dict, string or number is"


def why_not_written(folder: Path, step: int, files: Iterable[TensorFile], error: Exception) -> str:
    """For people: what it would have taken and what there is."""
    message = f"the checkpoint of step {step} could not be written to {folder}: {error}."
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error):
        needed = sum(t.nbytes for file in files for t in file.tensors.values())
        free = shutil.disk_usage(folder).free
        message += (
            f" It takes {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; make room or keep fewer."
        )
    return message + " Earlier checkpoints are as they were."
