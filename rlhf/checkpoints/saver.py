"""Checkpoints of a run on any number of ranks: each writes its own files, the first one finishes.

    each rank writes its files into step_000012.tmp-<token>, and part_00003.json with their digests last
    the first one waits for all parts, writes the manifest and renames the folder

They meet in the file system alone, so all of it can go on in the background while the next step is computed
(`checkpoint.background`): the run pays for the copy on the host. A kill meanwhile costs the checkpoint that
was being written, never the one before.
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
from rlhf.distributed.watchdog import RankError
from rlhf.distributed.world import World
from rlhf.files import write_atomically


@dataclass(frozen=True, slots=True)
class _Job:
    """All that is written of one checkpoint by one rank."""

    step: int
    files: list[TensorFile]
    state: dict[str, Any] | None
    writers: Sequence[int]
    score: float | None


class Saver:
    """Saves and finds the checkpoints of a run. Every rank makes one, together."""

    def __init__(self, folder: Path, section: CheckpointConfig, world: World, *, timeout: float) -> None:
        """`timeout`: seconds that the first rank waits for the parts of the others."""
        self.folder, self.section, self.world, self.timeout = folder, section, world, timeout
        background = section.background
        self.background = world.device.type == "cuda" if background is None else background
        self.token: str = world.gather(uuid4().hex[:8])[0]
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | RankError | None = None

    def save(self, step: int, parts: Mapping[str, Stateful], *, score: float | None = None) -> None:
        """Begins a checkpoint when the one before is done, and ends it unless that is left to the background.

        Raises CheckpointError, of either: the disk is full or cannot be written, or a rank's part is missing;
        RankError: a rank whose part was waited for has died. Every rank calls it.
        """
        self.wait()
        tensors = tensors_of(parts)
        sharded = next((t for group in tensors.values() for t in group.values() if is_sharded(t)), None)
        writers = [0] if sharded is None else savers(sharded)
        if self.world.rank not in writers:
            return
        state = state_of(parts) if self.world.is_main else None
        checkpoint.assert_json(state, "state")
        # what changes in a run on a GPU is there, and what comes from there is a copy
        copy = self.background and self.world.device.type == "cpu"
        files = tensor_files(tensors, rank=self.world.rank, copy=copy)
        job = _Job(step, files, state, writers, score)
        if self.background:
            self._thread = threading.Thread(target=self._write_behind, args=(job,), name="saver", daemon=True)
            self._thread.start()
        else:
            self._write(job)

    def wait(self) -> None:
        """Until the checkpoint under way is done. Raises what `save` does."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raises the error of the background, if there is one."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies, its files dealt out over the ranks; the same one on all."""
        world = self.world
        names: list[str] = world.gather([path.name for path in checkpoint.candidates(self.folder)])[0]
        for name in names:
            error = None
            try:
                checkpoint.verify(self.folder / name, part=world.rank, parts=world.size)
            except CheckpointError as caught:
                error = str(caught)
            found = [text for text in world.gather(error) if text is not None]
            if not found:
                return self.folder / name
            if world.is_main:
                checkpoint.warn_passed_over(found[0])
        return None

    def resume(self, path: Path, parts: Mapping[str, Stateful]) -> None:
        """Puts what `newest` found back into the parts."""
        saved = checkpoint.opened(path, device=self.world.device)
        load_state(parts, saved.state, saved.tensors)

    def _write_behind(self, job: _Job) -> None:
        try:
            self._write(job)
        except (CheckpointError, RankError) as error:
            self._error = error

    def _write(self, job: _Job) -> None:
        beside = checkpoint.unfinished(self.folder, job.step, self.token)
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
        checkpoint.prune(
            self.folder, job.step, keep_last=self.section.keep_last, keep_best=self.section.keep_best
        )

    def _parts_of_others(self, beside: Path, job: _Job) -> Entries:
        """Waits for them; they are no part of the checkpoint."""
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
