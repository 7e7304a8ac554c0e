"""Runs a benchmark in pieces that can be interrupted: each is a process with a deadline and a JSON file.

    RESULTS/NAME.json           the result of a finished piece, which is not run again until this is deleted
    RESULTS/bench-gpu.json      how every piece of the last call ended
    WORK/NAME.json, NAME.log    what a piece itself writes; kept when it is stopped, so that it can continue

A piece that fails, or is stopped at its deadline with all processes it started, is reported with its last
line, and the next one runs. A piece that exits with `UNAVAILABLE` says that this machine lacks what it needs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rlhf.files import write_atomically

ROOT = Path(__file__).parents[1]
SUMMARY = "bench-gpu.json"
UNAVAILABLE = 69
"""Exit code of a piece that cannot be measured here; its last line says why."""
OUT = "OUT"
"""In a command: the file that the piece writes."""


class State(StrEnum):
    DONE = "done"
    BEFORE = "done before"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    UNAVAILABLE = "not available here"
    NOT_STARTED = "not started"


@dataclass(frozen=True, slots=True)
class Piece:
    name: str
    command: tuple[str, ...]
    """The arguments of Python: `-m`, a module and its arguments."""
    deadline: float
    """Seconds."""


@dataclass(frozen=True, slots=True)
class Outcome:
    piece: str
    state: State
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where pieces run and what they leave behind."""

    results: Path
    work: Path
    machine: Mapping[str, Any]
    """Facts that are put into every result."""
    environment: Mapping[str, str]

    def finished(self, name: str) -> bool:
        """A file that was cut off does not count."""
        return read_json(self.results / f"{name}.json") is not None


def read_json(file: Path) -> Any:
    """The contents of a JSON file; None where there is no file, or it is not JSON."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def run_pieces(pieces: Sequence[Piece], place: Place, *, seconds: float = float("inf")) -> list[Outcome]:
    """Runs pieces without a result, in order, while their deadlines are within `seconds` from now."""
    place.results.mkdir(parents=True, exist_ok=True)
    place.work.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for piece in pieces:
        if place.finished(piece.name):
            outcome = Outcome(piece.name, State.BEFORE)
        elif time.monotonic() + piece.deadline > end:
            outcome = Outcome(piece.name, State.NOT_STARTED, reason="no time left in this call")
        else:
            print(f"{piece.name:24} ...", end="", flush=True)  # noqa: T201
            outcome = run_piece(piece, place)
            print(f" {outcome.state}, {outcome.seconds:.0f} s {outcome.reason}", flush=True)  # noqa: T201
        outcomes.append(outcome)
        found = {"machine": dict(place.machine), "pieces": [asdict(o) for o in outcomes]}
        write_atomically(place.results / SUMMARY, json.dumps(found, indent=1) + "\n")
    return outcomes


def run_piece(piece: Piece, place: Place) -> Outcome:
    """Runs one piece, even if it has a result."""
    out, log = place.work / f"{piece.name}.json", place.work / f"{piece.name}.log"
    arguments = [str(out) if part == OUT else part for part in piece.command]
    start = time.monotonic()
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **place.environment},
            start_new_session=True,
        )
        try:
            code = process.wait(piece.deadline)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # its child processes are ended too, even if it ended by itself or this process is interrupted
            _kill_group(process)
    seconds = round(time.monotonic() - start, 1)
    result = read_json(out) if code == 0 else None
    if result is None:
        return Outcome(piece.name, *_what_went_wrong(code, piece, seconds, log))
    found = {
        "piece": piece.name,
        "machine": dict(place.machine),
        "command": " ".join(["python", *piece.command]),
        "seconds": seconds,
        "result": result,
    }
    write_atomically(place.results / f"{piece.name}.json", json.dumps(found, indent=1) + "\n")
    return Outcome(piece.name, State.DONE, seconds)


def _what_went_wrong(code: int | None, piece: Piece, seconds: float, log: Path) -> tuple[State, float, str]:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "it said nothing"
    if code is None:
        return State.TIMED_OUT, seconds, f"(after {piece.deadline:.0f} s; last line: {last}; {log})"
    if code == UNAVAILABLE:
        return State.UNAVAILABLE, seconds, f"({last})"
    if code == 0:
        return State.FAILED, seconds, f"(it wrote no result; last line: {last}; {log})"
    return State.FAILED, seconds, f"(exit code {code}; last line: {last}; {log})"


def _kill_group(process: subprocess.Popen[Any]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 when every piece is done, 1 when something failed, 2 when another call is needed to finish."""
    states = {outcome.state for outcome in outcomes}
    if states & {State.FAILED, State.TIMED_OUT}:
        return 1
    return 2 if State.NOT_STARTED in states else 0
