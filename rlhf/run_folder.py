"""The folder of a run: who may write to it, what lies where, and how a resumed run takes up its streams.

RUN/config.yaml  RUN/metrics.jsonl  RUN/samples.jsonl  RUN/eval.json  RUN/checkpoints/  RUN/report.html
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.files import write_atomically

logger = logging.getLogger(__name__)


class RunFolderError(ValueError):
    """The run folder cannot be used. The message says why and what to do."""


@dataclass(frozen=True)
class RunFolder:
    """Names everything a run writes. `claim` before writing; reading needs no claim."""

    path: Path
    _lock: list[int] = field(default_factory=list[int], init=False, repr=False, compare=False)

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
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        return self.path / "report.html"
