"""Writes, verifies, reads and prunes checkpoint folders; exports models in the Hugging Face layout.

    RUN/checkpoints/
        LATEST                  name of the newest checkpoint, for people and scripts
        step_000012/
            policy.model.safetensors                one file for each mapping of tensors
            policy.optimizer.rank00003.safetensors  the rows that rank 3 holds of sharded tensors
            state.json          everything else a run needs to go on
            manifest.json       written last: size and sha256 of each file, and its own sha256

A checkpoint is written in `step_000012.tmp-<token>` (saver.py), synced to the disk and renamed, so a run that
is killed at any moment still has the checkpoint before. Neither safetensors nor a file system notices a
flipped bit, so digests are compared on every load. Nothing is pickled, unlike in torch's distributed
checkpoints, whose `.metadata` is a pickle. Instead, the safetensors header of a file of shards says which
rows of which tensors it holds, so files that were written by any number of ranks can be read by any other
number.
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
from rlhf.files import follow_umask, sync, write_atomically

logger = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"
STATE = "state.json"
EXPORT_MARK = "export.json"

# while a checkpoint is replaced by another of the same step, the old one stays loadable under a second name
_FOLDER = re.compile(r"step_(\d{6,})(\.replaced-\d+)?")
_UNFINISHED = re.compile(r"(step_\d{6,}|LATEST)\.tmp-(\w+)")
_TENSORS = re.compile(r"(.+?)(\.rank\d{5})?\.safetensors")


Entries = dict[str, dict[str, Any]]
"""Size (bytes) and digest (sha256) of each file, by name."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The contents of a checkpoint."""

    tensors: dict[str, SavedTensors]
    """By file, named `part.file`; the tensors are read from disk when they are asked for."""
    state: dict[str, Any]
    """By part."""


def unfinished_folder(folder: Path, step: int, token: str) -> Path:
    """The folder in which a checkpoint is written before it is renamed."""
    return folder / f"{_name(step)}.tmp-{token}"


def write_files(folder: Path, files: Iterable[TensorFile], state: Mapping[str, Any] | None) -> Entries:
    """Writes the files of one rank, and the state unless it is None; returns their sizes and digests."""
    names: list[str] = []
    for file in files:
        metadata = {ROWS: json.dumps(file.rows)} if file.rows else None
        save_file(file.tensors, folder / file.name, metadata)
        follow_umask(folder / file.name)
        sync(folder / file.name)
        names.append(file.name)
    if state is not None:
        write_atomically(folder / STATE, json.dumps(state))
        names.append(STATE)
    paths = [folder / name for name in names]
    return {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def finish(beside: Path, *, step: int, entries: Entries, world_size: int, score: float | None) -> None:
    """Writes the manifest into the folder `beside`, gives the folder its final name and updates LATEST."""
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
    """The newest undamaged checkpoint, or None. A warning names each damaged one."""
    for path in checkpoints_newest_first(folder):
        try:
            verify(path)
        except CheckpointError as error:
            warn_passed_over(error)
            continue
        return path
    return None


def checkpoints_newest_first(folder: Path) -> list[Path]:
    """All finished checkpoints, the newest first; they may be damaged, see `verify`."""
    return [path for _, path in _found(folder)]


def warn_passed_over(error: CheckpointError | str) -> None:
    """Logs that a damaged checkpoint is not used."""
    logger.warning("%s; passed over for the one before", error)


def load(path: Path, *, device: str | torch.device) -> Checkpoint:
    """Verifies a checkpoint and opens it; its tensors are read onto `device`.

    Raises CheckpointError, which names the file: it is missing, its size or digest differs, it is unreadable.
    """
    verify(path)
    return read_verified(path, device=device)


def read_verified(path: Path, *, device: str | torch.device) -> Checkpoint:
    """Opens a checkpoint without comparing digests: for one that `verify` has accepted."""
    manifest = _read_manifest(path / MANIFEST)
    files: dict[str, list[Path]] = {}
    for name in manifest["files"]:
        if match := _TENSORS.fullmatch(name):
            files.setdefault(match[1], []).append(path / name)
    tensors = {name: SavedTensors(paths, device) for name, paths in files.items()}
    return Checkpoint(tensors, json.loads((path / STATE).read_text()))


def verify(path: Path, *, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Compares sizes and digests of the files with the manifest, and returns the manifest.

    With `parts` > 1 only every `parts`-th file is compared, from `part` on, so that ranks can share the work.
    Raises CheckpointError as `load` does.
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
    """A Hugging Face model or tokenizer, or anything else with their `save_pretrained`."""

    def save_pretrained(self, save_directory: str) -> object: ...


def export(model: Saves, tokenizer: Saves, folder: Path) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained(folder)` loads; replaces an earlier export.

    Raises CheckpointError: the folder has other contents than an earlier export, or cannot be written.
    """
    # through a link, so that the folder that it names is written and the link stays
    folder = folder.resolve()
    check_export(folder)
    beside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        _remove_exports_of_dead(folder)
        beside.mkdir(parents=True)
        # first, so that what a kill leaves can be told from the folder of somebody else
        write_atomically(beside / EXPORT_MARK, json.dumps({"versions": _versions()}, indent=1))
        model.save_pretrained(str(beside))
        tokenizer.save_pretrained(str(beside))
        for file in beside.rglob("*"):
            if file.is_file():
                follow_umask(file)
            sync(file)
        _put_in_place(beside, folder)
    except (OSError, SafetensorError, ValueError) as error:
        # transformers raises a ValueError where a config is not valid
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"the model could not be exported to {folder}: {error}") from error


def _remove_exports_of_dead(folder: Path) -> None:
    """Removes unfinished exports to `folder` whose processes were killed: named and marked by `export`."""
    name = re.compile(rf"{re.escape(folder.name)}\.(tmp|replaced)-(\d+)")
    for path in folder.parent.iterdir() if folder.parent.is_dir() else ():
        match = name.fullmatch(path.name)
        if match and (path / EXPORT_MARK).is_file() and not Path(f"/proc/{match[2]}").exists():
            shutil.rmtree(path)


def check_export(folder: Path) -> None:
    """Raises CheckpointError when an export to `folder` would overwrite anything but an earlier export."""
    if folder.is_file() or (
        folder.exists() and any(folder.iterdir()) and not (folder / EXPORT_MARK).is_file()
    ):
        raise CheckpointError(
            f"{folder} is not empty and is no earlier export; nothing was overwritten, choose another folder"
        )


def _seal(body: Mapping[str, Any]) -> str:
    """The text of a manifest, with the digest of its own contents."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _read_manifest(file: Path) -> dict[str, Any]:
    """A manifest without its own digest. Raises CheckpointError: missing, damaged, or of another format."""
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
    # sealed again, its contents must give the same text, or some bit of the file has changed
    if _seal(body) != text:
        raise CheckpointError(f"{file}: digest differs, its contents are not what was written")
    if body["format"] != FORMAT:
        raise CheckpointError(f"{file}: format {body['format']}, this version reads format {FORMAT}")
    return body


def _put_in_place(beside: Path, target: Path) -> None:
    """Renames `beside` to `target`; what was there is moved aside before and removed afterwards."""
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
    """Steps and paths of the finished checkpoints, the newest first.

    The step is that of the manifest: a folder may have been renamed. Where the manifest cannot be read, the
    name has to do.
    """
    found: list[tuple[int, Path]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _FOLDER.fullmatch(path.name):
            step = _step_in(path)
            found.append((int(match[1]) if step is None else step, path))
    return sorted(found, key=lambda entry: (-entry[0], entry[1].name))


def _step_in(path: Path) -> int | None:
    """The step that a checkpoint's manifest says; None where it cannot be read."""
    try:
        return int(_read_manifest(path / MANIFEST)["step"])
    except (CheckpointError, OSError):
        return None


def remove_leftovers(folder: Path, token: str) -> None:
    """Removes unfinished checkpoints of runs that were killed; those with `token` are still being written."""
    for path in folder.iterdir():
        if (match := _UNFINISHED.fullmatch(path.name)) and match[2] != token:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def prune(folder: Path, step: int, *, keep_last: int, keep_best: int) -> None:
    """Removes old checkpoints after one of `step` was written: all but the last and the best ones.

    Those of later steps are removed too: they are of an earlier run that was resumed from before them. What
    cannot be read, because it is damaged or of another version, is never removed.
    """
    kept = _best(folder, keep_best)
    last: set[int] = set()
    for found_step, path in _found(folder):
        if _step_in(path) is None and ".replaced-" not in path.name:
            continue
        if found_step > step:
            logger.warning("%s is of a later step than the one just written; it is removed", path)
        elif found_step not in last and len(last) < keep_last:
            last.add(found_step)
            continue
        elif path in kept:
            continue
        _remove(path)


def _remove(path: Path) -> None:
    """Removes a checkpoint under another name, so that what a kill leaves of it is known as a leftover."""
    leaving = path.with_name(f"{path.name.partition('.')[0]}.tmp-removed{os.getpid()}")
    with suppress(OSError):
        os.rename(path, leaving)
        shutil.rmtree(leaving)


def _best(folder: Path, count: int) -> set[Path]:
    """The `count` checkpoints with the highest scores, of equal ones the newest; no damaged ones."""
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
    """Asserts that `value` comes back from JSON unchanged: no tuples, no keys that are numbers.

    `where` names the value in the error.
    """
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
    """The error message of a failed save; on a full disk it says how much is needed and how much is free."""
    message = f"the checkpoint of step {step} could not be written to {folder}: {error}."
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error):
        needed = sum(t.nbytes for file in files for t in file.tensors.values())
        free = shutil.disk_usage(folder).free
        message += (
            f" It takes {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; make room or keep fewer."
        )
    return message + " Earlier checkpoints are as they were."
