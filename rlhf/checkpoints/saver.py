"""Saves and resumes checkpoints on any number of ranks: each rank writes its own files, rank 0 finishes.

1. Each rank writes its files into step_000012.tmp-<token>, and last part_00003.json with their digests.
2. Rank 0 waits for these parts of all ranks, writes the manifest and renames the folder.

The ranks communicate through the file system alone, so all of this can happen in the background while the
next step is computed (`checkpoint.background`); the run only waits for the copy to the host. If a run is
killed meanwhile, the checkpoint that was being written is lost, never the one before.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from rlhf.checkpoints import store as checkpoint
from rlhf.checkpoints.stateful import CheckpointError, Stateful, load_state, state_of, tensors_of
from rlhf.checkpoints.store import Entries
from rlhf.checkpoints.tensor_files import TensorFile, tensor_files
from rlhf.config.run import CheckpointConfig
from rlhf.distributed.shards import is_sharded, savers
from rlhf.distributed.world import World
from rlhf.files import SAVED, write_atomically


@dataclass(frozen=True, slots=True)
class _Job:
    """Everything that one rank writes of one checkpoint."""

    step: int
    files: list[TensorFile]
    state: dict[str, Any] | None
    """None on every rank but 0."""
    writers: Sequence[int]
    """The ranks that write files of this checkpoint."""
    score: float | None
    """The score that `checkpoint.keep_best` compares; None: there was no evaluation."""


class Saver:
    """Saves and finds the checkpoints of a run. Every rank makes one, at the same time."""

    def __init__(self, folder: Path, section: CheckpointConfig, world: World, *, timeout: float) -> None:
        """`timeout`: seconds that rank 0 waits for the parts of the other ranks."""
        self.folder, self.section, self.world, self.timeout = folder, section, world, timeout
        background = section.background
        self.background = world.device.type == "cuda" if background is None else background
        self.token: str = world.gather(uuid4().hex[:8])[0]
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.passed_over: list[str] = []
        """Why `newest` did not take the checkpoints that it passed over."""

    def save(self, step: int, parts: Mapping[str, Stateful], *, score: float | None = None) -> None:
        """Waits for the checkpoint before, and writes one of `step`, in the background if that is set.

        Every rank calls it. Raises CheckpointError, for this checkpoint or the one before: the disk is full
        or cannot be written, or a rank has not written its part; RankError: a rank with a missing part has
        died.
        """
        self.wait()
        tensors = tensors_of(parts)
        sharded = next((t for group in tensors.values() for t in group.values() if is_sharded(t)), None)
        writers = [0] if sharded is None else savers(sharded)
        if self.world.rank not in writers:
            return
        state = state_of(parts) if self.world.is_main else None
        checkpoint.assert_json(state, "state")
        # on a GPU run, everything that changes is on the GPU, and moving it to the host copies it already
        copy = self.background and self.world.device.type == "cpu"
        files = tensor_files(tensors, rank=self.world.rank, copy=copy)
        job = _Job(step, files, state, writers, score)
        if self.background:
            self._thread = threading.Thread(
                target=self._write_in_background, args=(job,), name="saver", daemon=True
            )
            self._thread.start()
        else:
            self._write(job)

    def wait(self) -> None:
        """Waits until the checkpoint being written is done. Raises what `save` raises."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raises the error of the checkpoint written in the background, if there is one."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def newest(self) -> Path | None:
        """The newest undamaged checkpoint, the same on all ranks; None if there is none.

        The ranks share the work of verifying the files. A warning names each damaged checkpoint.
        """
        world = self.world
        newest_first = checkpoint.checkpoints_newest_first(self.folder)
        names: list[str] = world.gather([path.name for path in newest_first])[0]
        for name in names:
            error = None
            try:
                checkpoint.verify(self.folder / name, part=world.rank, parts=world.size)
            except CheckpointError as caught:
                error = str(caught)
            found = [text for text in world.gather(error) if text is not None]
            if not found:
                return self.folder / name
            self.passed_over.append(found[0])
            if world.is_main:
                checkpoint.warn_passed_over(found[0])
        return None

    def resume(self, path: Path, parts: Mapping[str, Stateful]) -> None:
        """Loads the checkpoint at `path` into `parts`. Raises CheckpointError: it does not fit them."""
        saved = checkpoint.read_verified(path, device=self.world.device)
        load_state(parts, saved.state, saved.tensors)

    def _write_in_background(self, job: _Job) -> None:
        try:
            self._write(job)
        except BaseException as error:
            # nobody sees an exception in a thread: `check` raises it, whatever it is
            self._error = error

    def _write(self, job: _Job) -> None:
        """Writes this rank's part of a checkpoint; on rank 0 also finishes it and removes old ones."""
        beside = checkpoint.unfinished_folder(self.folder, job.step, self.token)
        main = self.world.is_main
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if main:
                checkpoint.remove_leftovers(self.folder, self.token)
            beside.mkdir(exist_ok=True)
            entries = checkpoint.write_files(beside, job.files, job.state)
            if not main:
                write_atomically(beside / _part(self.world.rank), json.dumps(entries))
                return
            entries |= self._parts_of_others(beside, job)
            checkpoint.finish(
                beside, step=job.step, entries=entries, world_size=self.world.size, score=job.score
            )
        except (OSError, SafetensorError) as error:
            if main:
                shutil.rmtree(beside, ignore_errors=True)
            raise CheckpointError(
                checkpoint.why_not_written(self.folder, job.step, job.files, error)
            ) from error
        except BaseException:
            if main:
                shutil.rmtree(beside, ignore_errors=True)
            raise
        write_atomically(self.folder.parent / SAVED, f"{beside.name.partition('.')[0]}\n")
        checkpoint.prune(
            self.folder, job.step, keep_last=self.section.keep_last, keep_best=self.section.keep_best
        )

    def _parts_of_others(self, beside: Path, job: _Job) -> Entries:
        """Waits for the parts of the other ranks; returns what they list, and removes the part files."""
        deadline = time.monotonic() + self.timeout
        missing, entries = [rank for rank in job.writers if rank != 0], Entries()
        while missing:
            for rank in [r for r in missing if (beside / _part(r)).is_file()]:
                entries |= json.loads((beside / _part(rank)).read_text())
                (beside / _part(rank)).unlink()
                missing.remove(rank)
            if missing:
                self.world.check_others()
            if missing and time.monotonic() > deadline:
                late = ", ".join(map(str, missing))
                raise CheckpointError(
                    f"the checkpoint of step {job.step} is not finished: rank {late} has not written its "
                    f"part within distributed.timeout = {self.timeout:g} s. Do all ranks see {self.folder}?"
                )
            time.sleep(0.02)
        return entries


def _part(rank: int) -> str:
    return f"part_{rank:05d}.json"
