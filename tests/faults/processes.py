"""Ranks of a run, forked from a process that has imported everything already, with a fault in one of them.

Importing torch and transformers takes seconds; a fork of a process that has takes none, so that a run which
is killed and resumed costs about two seconds.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from tests.support import bandit_settings, without_clocks

Action = Literal["kill", "freeze", "stall", "term", "no space", "raise", "nan", "little memory"]
SMALL_BLOCK = 1 << 16
"""Bytes; tensors of a call that has to run out of memory are larger than this."""


@dataclass(frozen=True)
class Fault:
    """What happens at call number `call` (from 0) of `where`: `module:name` or `module:Class.method`."""

    where: str
    call: int = 0
    action: Action = "kill"
    after: bool = False
    """Whether the fault is after the call, not before it; "little memory" and "nan" are during the call."""
    rank: int = 0

    def __str__(self) -> str:
        name = self.where.replace("rlhf.", "").replace("torch.", "").replace(":", ".")
        return f"{name}-{self.call}{'-after' if self.after else ''}{f'-rank{self.rank}' if self.rank else ''}"


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    code: int
    """Exit status, or minus the number of the signal that ended it."""
    said: str
    at: float
    """When it ended, by `time.monotonic` of the test."""


def launch(
    settings: Mapping[str, Any],
    log: Path,
    *,
    ranks: int = 1,
    fault: Fault | None = None,
    limits: Mapping[str, int] | None = None,
    deadline: float = 300.0,
) -> list[Ended]:
    """Runs `rlhf train` with these settings to its end. A rank that outlives the deadline fails the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.preloaded"])
    port = free_port()
    begin = time.monotonic()
    started: list[Any] = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
        process = context.Process(
            target=_run_rank, args=(dict(settings), place, fault, dict(limits or {}), f"{log}.{rank}")
        )
        process.start()
        started.append(process)
    frozen = fault.rank if fault is not None and fault.action == "freeze" else None
    at: dict[int, float] = {} if frozen is None else {frozen: 0.0}
    try:
        while len(at) < ranks and time.monotonic() < begin + deadline:
            running = [process for rank, process in enumerate(started) if rank not in at]
            wait([process.sentinel for process in running], timeout=1.0)
            now = time.monotonic()
            at |= {r: now for r, process in enumerate(started) if r not in at and not process.is_alive()}
        ended = [_ended(process, f"{log}.{rank}", at.get(rank)) for rank, process in enumerate(started)]
    finally:
        for process in started:
            process.kill()
            process.join()
    for rank, each in enumerate(ended):
        assert rank in at, f"rank {rank} hangs {deadline:.0f} s after the start: {each.said}"
    return ended


def _ended(process: Any, log: str, at: float | None) -> Ended:
    """The exit status and output of a process, even if it has not ended."""
    file = Path(log)
    said = file.read_text(errors="replace") if file.is_file() else ""
    return Ended(process.exitcode or 0, said, at or 0.0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_rank(
    settings: dict[str, Any],
    place: dict[str, int],
    fault: Fault | None,
    limits: dict[str, int],
    log: str,
) -> None:
    """Runs one rank; called in the forked process."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    if place["WORLD_SIZE"] > 1:
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    for name, value in limits.items():
        number = getattr(resource, name)
        resource.setrlimit(number, (value, resource.getrlimit(number)[1]))
    if fault is not None and fault.rank == place["RANK"]:
        plant(fault)
    from rlhf.cli import main

    config = Path(f"{log}.json")
    config.write_text(json.dumps(settings))
    code = main(["train", str(config)])
    sys.stderr.flush()
    os._exit(code)


def plant(fault: Fault) -> None:
    """Wraps the function of the fault, in the module or class that has it."""
    module_name, _, path = fault.where.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    static = isinstance(vars(owner).get(name), classmethod | staticmethod)
    calls = -1

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        hit = calls == fault.call
        if hit and not fault.after:
            strike(fault.action)
        with little_memory() if hit and fault.action == "little memory" else nullcontext():
            result = original(*args, **kwargs)
        if hit and fault.after:
            strike(fault.action)
        return result * math.nan if hit and fault.action == "nan" else result

    setattr(owner, name, staticmethod(wrapper) if static else wrapper)


def strike(action: Action) -> None:
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "stall":
            time.sleep(600)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "no space":
            raise OSError(28, "No space left on device")
        case "raise":
            raise ArithmeticError("an accident")
        case "nan" | "little memory":
            pass


@contextmanager
def little_memory() -> Generator[None]:
    """While this context lasts, the process cannot allocate memory, except for small blocks.

    A limit on the address space alone is not enough: freed memory that the allocator keeps may suffice for
    the call on some machines. So all free blocks are allocated too, except small ones, which Python and the
    error need. The limit ends with the context, or it would stop whatever comes next instead of the call.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE"), before[1]))
    held: list[torch.Tensor] = []
    size = 1 << 30
    try:
        while size >= SMALL_BLOCK:
            try:
                held.append(torch.empty(size, dtype=torch.uint8))
            except RuntimeError:
                size //= 2
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


STEPS, EVERY = 5, 2
KINDS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "ppo_max": {
        "algorithm": {"name": "ppo_max", "kl": {"coef": 0.01, "estimator": "k1", "placement": "reward"}}
    },
    "sharded": {"distributed": {"mode": "sharded"}},
}
"""Kinds of runs, by the settings in which they differ from the first."""


def settings_of(folder: Path, model: Path, kind: str = "grpo", **changes: Any) -> dict[str, Any]:
    """Settings: five steps of two updates, a reference, evaluations, a checkpoint every second step."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = bandit_settings(
        folder,
        model,
        steps=STEPS,
        rollout={"prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 6},
        data={"eval": str(folder / "train.jsonl")},
        eval={"every": 3, "samples": 1, "max_prompts": 4},
        learner={"minibatches": 2},
        checkpoint={"every": EVERY, "resume": "auto"},
    )
    settings["algorithm"] = {"name": "grpo", "kl": {"coef": 0.01, "target": 0.05, "horizon": 100}}
    for key, value in (KINDS[kind] | changes).items():
        if key == "algorithm":
            settings[key] = value
            continue
        settings[key] = {**settings[key], **value} if isinstance(settings.get(key), dict) else value
    return settings


def result(folder: Path) -> dict[str, Any]:
    """Everything that a finished run leaves, except times, for a bit-for-bit comparison."""
    run = folder / "run"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (newest,) = (run / "checkpoints").glob(f"step_{STEPS:06d}")
    return {
        "metrics": without_clocks([json.loads(line) for line in lines]),
        "samples": (run / "samples.jsonl").read_text(),
        "evaluations": json.loads((run / "eval.json").read_text()),
        "state": json.loads((newest / "state.json").read_text()),
        "tensors": {
            f"{file.name}/{name}": tensor.flatten().view(torch.uint8).numpy().tobytes()
            for file in newest.glob("*.safetensors")
            for name, tensor in load_file(file).items()
        },
    }


def assert_same(got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        assert got[name] == value, f"{name} differ from those of the run that was never stopped"


def logged_steps(folder: Path) -> int:
    metrics = folder / "run" / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0
