"""The folder of a run: the paths of its files, its lock, and what a resumed run drops from its files.

RUN/config.yaml     the value of every setting    RUN/checkpoints/
RUN/metrics.jsonl   one object a step             RUN/tensorboard/
RUN/samples.jsonl   one object a recorded group   RUN/report.html
RUN/eval.json       one object an evaluation      RUN/.lock
RUN/rewards.log     what reward functions print         RUN/data/   rows that were given as objects
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from rlhf.config.overrides import load_yaml
from rlhf.files import SAVED, write_atomically

logger = logging.getLogger(__name__)

# names of rlhf/files.py and rlhf/checkpoints/store.py for what is being written, with the process's number
_LEFTOVER = re.compile(
    r"(config\.yaml|\.saved|(metrics|samples)\.jsonl|(eval|calibration)\.json|report\.html|(wandb|trackio)_id)\.tmp-\d+"
    r"|(model|adapter)\.(tmp|replaced)-\d+"
)


STARTED_IN = "# relative paths are from "
"""The first line of config.yaml, which goes on with the folder where the run was started."""


class RunFolderError(ValueError):
    """The run folder cannot be used. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of everything that a run writes. Writing needs a `claim`, reading does not."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "eval.json"

    @property
    def rewards_log(self) -> Path:
        return self.path / "rewards.log"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def saved(self) -> Path:
        return self.path / SAVED

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    def has_run(self) -> bool:
        """Whether the folder has steps or checkpoints; a run that failed before step 1 leaves none."""
        logged = self.metrics.is_file() and self.metrics.stat().st_size > 0
        saved = self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        return logged or saved or self.saved.is_file()

    def settings(self) -> str | None:
        """The text of config.yaml, if there is one. Raises RunFolderError when it holds no settings."""
        if not self.config.is_file():
            return None
        try:
            text = self.config.read_text(encoding="utf-8")
            tree: object = load_yaml(text)
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            problem = " ".join(str(error).split())
        else:
            if tree is None or isinstance(tree, dict):
                return text
            problem = f"it holds a {type(tree).__name__}"
        raise RunFolderError(
            f"{self.config} cannot be read ({problem}); it says how the run was trained: bring it back, or "
            "remove it to go on with the settings that you give"
        )

    def started_in(self) -> Path | None:
        """The folder that relative paths of config.yaml start from; None: it is not known.

        It is the folder where the run was started or, if the whole was moved since, that under which the run
        folder is at the relative path `run_dir`.
        """
        text = self.settings() or ""
        first = text.partition("\n")[0]
        folder = Path(first.removeprefix(STARTED_IN)) if first.startswith(STARTED_IN) else None
        settings: dict[str, Any] = yaml.safe_load(text) or {}
        run_dir = Path(str(settings.get("run_dir", "")))
        parts = () if run_dir.is_absolute() else run_dir.parts
        own = self.path.resolve()
        if (folder is None or not folder.is_dir()) and parts and own.parts[-len(parts) :] == parts:
            folder = own.parents[len(parts) - 1]
        return folder if folder is not None and folder.is_dir() else None

    @contextmanager
    def claim(self, *, config: str, resume: bool) -> Generator[None]:
        """Locks the folder for this process while the context lasts.

        A new run's `config` is written to config.yaml at once; that of a run that is resumed stays as it is
        until the resume has succeeded (`write_settings`). With `resume` and no run in the folder, a new run
        begins. Raises RunFolderError when another process
        has locked the folder (the message names its pid and host), when there is a run and `resume` is false,
        when there are other files, or when the folder cannot be created.
        """
        self.assert_ours()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunFolderError(f"the run folder {self.path} cannot be written: {error}") from error
        try:
            self._hold(descriptor)
            if not resume:
                self.assert_no_run()
            self._remove_leftovers()
            if not self.has_run():
                self.write_settings(config)
            yield
        finally:
            os.close(descriptor)

    def write_settings(self, text: str) -> None:
        """Replaces config.yaml."""
        write_atomically(self.config, text)

    def traces(self) -> list[str]:
        """What shows that a run in this folder has saved checkpoints; nothing if it has saved none yet."""
        found = [f"{self.saved} says that {self._last_saved()} was saved"] if self.saved.is_file() else []
        folders = sorted(path.name for path in self.checkpoints.glob("step_*") if ".tmp-" not in path.name)
        return found + ([f"{self.checkpoints} holds {', '.join(folders)}"] if folders else [])

    def _last_saved(self) -> str:
        return self.saved.read_text(encoding="utf-8", errors="replace").strip()[:100]

    def cut(self, *, after: int, sampled: int | None = None) -> list[str]:
        """Drops the entries of steps after `after`, so that a resumed run logs each step once.

        `sampled`: the last step to keep in samples.jsonl, where that is not `after`. A run without a
        checkpoint begins again: `cut(after=-1)`. A last line that a kill left incomplete is dropped too.
        Returns a sentence for each file of which more was lost: lines that are damaged, an eval.json.
        """
        lost: list[str] = []
        for stream, last in ((self.metrics, after), (self.samples, after if sampled is None else sampled)):
            if stream.is_file():
                # not splitlines, which would also split at characters such as U+2028 within a text
                lines = stream.read_text(encoding="utf-8", errors="replace").split("\n")
                steps = [_step_of(line) for line in lines]
                kept = [
                    line for line, step in zip(lines, steps, strict=True) if step is not None and step <= last
                ]
                if damaged := [number for number, step in enumerate(steps[:-1], start=1) if step is None]:
                    lost.append(
                        f"{stream}: {len(damaged)} damaged lines are dropped, the first is line {damaged[0]}"
                    )
                write_atomically(stream, "".join(line + "\n" for line in kept))
        if self.evaluations.is_file():
            try:
                records = json.loads(self.evaluations.read_text(encoding="utf-8"))
                kept_records = [record for record in records if record["step"] <= after]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                aside = self.evaluations.with_suffix(".json.damaged")
                os.replace(self.evaluations, aside)
                lost.append(f"{self.evaluations} cannot be read ({error}); it is {aside} now, without effect")
            else:
                write_atomically(self.evaluations, json.dumps(kept_records, indent=1))
        return lost

    def _remove_leftovers(self) -> None:
        """Removes what a kill left of files and exports that were being written, known by their names."""
        for path in self.path.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def assert_ours(self) -> None:
        """Raises RunFolderError: it is a file, cannot be made, or has files other than those of a run."""
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"the run folder {self.path} is a file; choose another run_dir")
        path = self.path.absolute()
        nearest = next(place for place in (path, *path.parents) if place.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise RunFolderError(
                f"the run folder {self.path} cannot be written: {nearest} is no folder that you may write "
                "to; choose another run_dir"
            )
        known = (self.lock, self.metrics, self.checkpoints)
        if self.path.is_dir() and any(self.path.iterdir()) and not any(p.exists() for p in known):
            raise RunFolderError(
                f"{self.path} holds files that are not those of a run; choose another run_dir, new or empty"
            )

    def assert_no_run(self) -> None:
        """Raises RunFolderError: there is a run in the folder."""
        if self.has_run():
            raise RunFolderError(
                f"{self.path} already holds a run, which would be overwritten; "
                "checkpoint.resume=auto continues it, another run_dir starts a new one"
            )

    def _hold(self, descriptor: int) -> None:
        """Takes the lock. The system releases it when the process ends, however it ends."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace").strip() or "another process"
            raise RunFolderError(
                f"{self.path} is in use by {holder}; wait for it, end it, or choose another run_dir"
            ) from None
        except OSError as error:
            logger.warning(
                "the file system of %s has no locks (%s): see to it that no other run uses the folder",
                self.path,
                error,
            )
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)


def with_origin(settings: str) -> str:
    """The text of config.yaml, which says first where its relative paths start: in the present folder."""
    return f"{STARTED_IN}{Path.cwd()}\n{settings}"


def changed_settings(before: str, now: str) -> list[str]:
    """The settings that differ between two config.yaml, as `learner.lr: 1e-05 -> 2e-05`.

    Settings that do not change what is learned, such as where and how often to write, are left out.
    """
    old, new = (dict(flat_settings(yaml.safe_load(text) or {})) for text in (before, now))
    ignored = ("run_dir", "steps", "checkpoint.", "monitor.", "eval.", "data.eval", "distributed.")
    keys = [key for key in old if key in new and not key.startswith(ignored)]
    return [f"{key}: {old[key]} -> {new[key]}" for key in keys if old[key] != new[key]]


def flat_settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of a dotted key and its value, as `("learner.lr", 1e-05)`."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat_settings(cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _step_of(line: str) -> int | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict):
        return None
    step = cast(dict[str, Any], entry).get("step")
    return step if isinstance(step, int) else None
