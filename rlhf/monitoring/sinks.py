"""Where metrics go beside RUN/metrics.jsonl: TensorBoard, W&B, trackio. Imported only when asked for."""

from __future__ import annotations

import importlib
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


class SinkError(ValueError):
    """A sink cannot be opened. The message says why and what to do."""


@runtime_checkable
class Sink(Protocol):
    """Takes the finite values of a step."""

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What it may raise when its disk or its service fails."""
        ...

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard. A resumed run hides what the earlier one logged of later steps."""

    failures = (OSError, RuntimeError, ValueError)

    def __init__(self, run: RunFolder) -> None:
        self.module = _import("torch.utils.tensorboard", extra=None)
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
    """Weights & Biases. RUN/wandb_id names the record there, so that a resumed run continues it."""

    def __init__(self, run: RunFolder, settings: Mapping[str, Any]) -> None:
        self.module = _import("wandb", extra="wandb")
        self.failures = (self.module.Error, OSError, RuntimeError, ValueError, TypeError)
        folder = run.path.resolve()
        identity = _identity(folder / "wandb_id")
        with _starting("wandb", self.failures):
            self.module.init(
                project=folder.parent.name,
                name=folder.name,
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
    """trackio knows a record by its project and name alone, so RUN/trackio_id is a part of the name."""

    failures = (sqlite3.Error, OSError, RuntimeError, ValueError, TypeError)

    def __init__(self, run: RunFolder, settings: Mapping[str, Any]) -> None:
        self.module = _import("trackio", extra="trackio")
        folder = run.path.resolve()
        name = f"{folder.name}-{_identity(folder / 'trackio_id')}"
        with _starting("trackio", self.failures):
            self.module.init(project=folder.parent.name, name=name, config=dict(settings), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


def make_sink(name: SinkName, run: RunFolder, settings: Mapping[str, Any]) -> Sink:
    """Raises SinkError: the package is not installed, or its service refuses (not logged in, no network)."""
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
            f"monitor.sinks asks for {name}, which does not start: {str(error).rstrip('.')}; or leave it out"
        ) from error


def _identity(record: Path) -> str:
    """Drawn once a run: two folders may have one name, and a folder may have had a run before."""
    if not record.exists():
        write_atomically(record, uuid.uuid4().hex[:12])
    return record.read_text()


def _import(name: str, *, extra: str | None) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        remedy = f"pip install 'tandem-rl[{extra}]'" if extra else f"pip install {error.name}"
        raise SinkError(
            f"monitor.sinks asks for {name}, which is not installed; {remedy}, or leave it out"
        ) from error
