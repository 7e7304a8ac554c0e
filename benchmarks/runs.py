"""Training runs as measurements: start one if it is not there yet, read what it left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Records = list[dict[str, Any]]


def train(config: Path, run: Path, settings: Sequence[str], *, done: str = "report.html") -> None:
    """One `rlhf/train.py` run to its end; one that was finished before, and left `done`, is not repeated."""
    if (run / done).is_file():
        return
    settings = [
        f"run_dir={run}",
        "checkpoint.export=false",
        "checkpoint.every=0",
        "monitor.sinks=[]",
        *settings,
    ]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "1", str(ROOT / "rlhf" / "train.py")]
    subprocess.run([sys.executable, *command, str(config), *settings], check=True)


def read(run: Path) -> tuple[Records, Records]:
    """The steps and the evaluations of a run, if it had any."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = run / "eval.json"
    return steps, json.loads(evaluations.read_text()) if evaluations.is_file() else []
