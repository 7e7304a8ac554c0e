"""Where metrics go beside RUN/metrics.jsonl: TensorBoard, W&B, trackio. Imported only when asked for."""

from __future__ import annotations

import importlib
import sqlite3
import uuid
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal, Protocol, runtime_checkable

from rlhf.files import write_atomically
from rlhf.run_folder import RunFolder

SinkName = Literal["tensorboard", "wandb", "trackio"]


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
        record = folder / "wandb_id"
        if not record.exists():
            write_atomically(record, uuid.uuid4().hex[:12])
        self.module.init(
            project=folder.parent.name,
            name=folder.name,
            dir=str(folder),
            config=dict(settings),
            id=record.read_text(),
            resume="allow",
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


class Trackio:
    """trackio keeps its record by project and name, and continues it when both are there."""

    failures = (sqlite3.Error, OSError, RuntimeError, ValueError, TypeError)

    def __init__(self, run: RunFolder, settings: Mapping[str, Any]) -> None:
        self.module = _import("trackio", extra="trackio")
        folder = run.path.resolve()
        self.module.init(project=folder.parent.name, name=folder.name, config=dict(settings), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


def make_sink(name: SinkName, run: RunFolder, settings: Mapping[str, Any]) -> Sink:
    """Raises ValueError when the package is not installed."""
    match name:
        case "tensorboard":
            return TensorBoard(run)
        case "wandb":
            return WandB(run, settings)
        case "trackio":
            return Trackio(run, settings)


def _import(name: str, *, extra: str | None) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        remedy = f"pip install 'tandem-rl[{extra}]'" if extra else f"pip install {error.name}"
        raise ValueError(
            f"monitor.sinks asks for {name}, which is not installed; {remedy}, or leave it out"
        ) from error
