"""Training runs as measurements: trains a run unless it is finished, reads its metrics and evaluations."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
Records = list[dict[str, Any]]


def train(config: Path, run: Path, settings: Sequence[str], *, done: str = "report.html") -> None:
    """Trains one run to its end, unless it was finished before and left the file `done`."""
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


def machine() -> dict[str, Any]:
    """The facts about this machine that figures depend on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_claims(
    file: Path, module: str, begun: float, found: dict[str, Any], asserted: dict[str, bool]
) -> None:
    """Writes what a script of tables has found and prints whether each claim holds; exits with 1 if one does
    not. `begun`: `time.process_time()` at its start.
    """
    head = {
        "command": " ".join([f"python -m benchmarks.{module}", *sys.argv[1:]]),
        "machine": machine(),
        "cpu_seconds": round(time.process_time() - begun, 1),
    }
    file.write_text(json.dumps(head | found | {"asserted": asserted}, indent=1) + "\n")
    for claim, held in asserted.items():
        sys.stdout.write(f"{'holds' if held else 'FAILS'}: {claim}\n")
    if not all(asserted.values()):
        sys.exit(1)
