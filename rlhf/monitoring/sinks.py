"""Sinks of metrics besides RUN/metrics.jsonl: TensorBoard, Weights & Biases, trackio (`monitor.sinks`)."""

from __future__ import annotations

import importlib
import os
import sqlite3
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, runtime_checkable

from rlhf.files import write_atomically
from rlhf.monitoring.run_folder import RunFolder

SinkName = Literal["tensorboard", "wandb", "trackio"]


INSTALL: Mapping[SinkName, str] = {
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install 'tandem-rl[wandb]'",
    "trackio": "pip install 'tandem-rl[trackio]'",
}


class SinkError(ValueError):
    """A sink cannot be opened. The message says why and what to do."""


@runtime_checkable
class Sink(Protocol):
    """Receives the finite metrics of each step."""

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """The errors that `write` and `close` may raise when a disk or a service fails."""
        ...

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard. A resumed run hides later steps that were logged before."""

    failures = (OSError, RuntimeError, ValueError)

    def __init__(self, run: RunFolder) -> None:
        self.module = check_installed("tensorboard")
        self.run = run
        self.writer: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.writer is None:
            self.writer = self.module.SummaryWriter(str(self.run.tensorboard), purge_step=step)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WandB:
    """Weights & Biases. RUN/wandb_id holds the id of the run there, so that a resumed run continues it."""

    def __init__(self, run: RunFolder, settings: Mapping[str, Any]) -> None:
        self.module = check_installed("wandb")
        self.failures = (self.module.Error, OSError, RuntimeError, ValueError, TypeError)
        folder = run.path.resolve()
        identity = _identity(folder / "wandb_id")
        with _starting("wandb", self.failures):
            project, name = _names(settings)
            self.module.init(
                project=project or os.environ.get("WANDB_PROJECT") or folder.parent.name,
                name=name or os.environ.get("WANDB_NAME") or folder.name,
                dir=str(folder),
                config=dict(settings),
                id=identity,
                resume="allow",
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


class Trackio:
    """trackio identifies a run by project and name only, so the name contains the id in RUN/trackio_id."""

    failures = (sqlite3.Error, OSError, RuntimeError, ValueError, TypeError)

    def __init__(self, run: RunFolder, settings: Mapping[str, Any]) -> None:
        self.module = check_installed("trackio")
        folder = run.path.resolve()
        project, own = _names(settings)
        name = f"{own or folder.name}-{_identity(folder / 'trackio_id')}"
        with _starting("trackio", self.failures):
            self.module.init(
                project=project or folder.parent.name, name=name, config=dict(settings), resume="allow"
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


def make_sink(name: SinkName, run: RunFolder, settings: Mapping[str, Any]) -> Sink:
    """Opens a sink by name.

    Raises SinkError when its package is not installed, or its service refuses (not logged in, no network).
    """
    match name:
        case "tensorboard":
            return TensorBoard(run)
        case "wandb":
            return WandB(run, settings)
        case "trackio":
            return Trackio(run, settings)


@contextmanager
def _starting(name: str, failures: tuple[type[Exception], ...]) -> Generator[None]:
    try:
        yield
    except failures as error:
        raise SinkError(
            f"monitor.sinks asks for {name}, which does not start: {str(error).rstrip('.')}; mend that, or "
            f"remove {name} from monitor.sinks"
        ) from error


def _names(settings: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Project and name that the settings give a run."""
    section = settings.get("monitor", {})
    return section.get("project"), section.get("name")


def _identity(file: Path) -> str:
    """The id in the file, drawn at random when the run begins: names of folders are not unique."""
    if not file.exists():
        write_atomically(file, uuid.uuid4().hex[:12])
    return file.read_text()


def check_installed(sink: SinkName) -> ModuleType:
    """The package of a sink. Raises SinkError when it is not installed, or cannot be imported."""
    name = "torch.utils.tensorboard" if sink == "tensorboard" else sink
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError) or error.name != sink:
            raise SinkError(
                f"monitor.sinks asks for {sink}, which is installed but cannot be imported: {error}; install "
                f"what it needs, or remove {sink} from monitor.sinks"
            ) from error
        raise SinkError(
            f"monitor.sinks asks for {sink}, which is not installed: {INSTALL[sink]}, or remove it from the "
            "list"
        ) from error
