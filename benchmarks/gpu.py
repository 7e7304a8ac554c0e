"""All GPU benchmarks, in pieces of at most 8 minutes; on a CPU the same pieces, scaled down.

    make bench-gpu                                              # results in benchmarks/results/MACHINE
    python -m benchmarks.gpu --results FOLDER --work FOLDER [--seconds 540] [--only NAME ...]

A finished piece is not run again, an interrupted one continues where it can (benchmarks/pieces.py). The
models with random weights and the runs are kept in the work folder. Nothing is downloaded: TRL is measured
if `--trl-python` names a Python that has it, the real model if `python -m rlhf.small_model` has made it.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.pieces import OUT, Piece, Place, exit_code, run_pieces
from benchmarks.runs import machine
from rlhf.small_model import small_model_path

LIMIT = 480.0
"""Seconds that the longest piece may take."""
PEERS = ("flash-attn", "trl", "liger-kernel", "cut-cross-entropy", "verl")
PACKAGES = ("torch", "triton", "transformers", *PEERS)


def module(name: str, *arguments: str | int | Path) -> tuple[str, ...]:
    return ("-m", f"benchmarks.{name}", *map(str, arguments), "--out", OUT)


def test_pieces() -> list[Piece]:
    tools = ("memcheck", "racecheck")
    return [
        Piece("tests", module("marked_tests"), LIMIT),
        *(Piece(tool, module("marked_tests", "--sanitizer", tool), LIMIT) for tool in tools),
    ]


def token_stats_pieces(device: str) -> list[Piece]:
    """The shapes that the kernels are designed for, with a tensor-parallel shard and a small batch."""
    shapes = {
        "cuda": {
            "large": "16384,4096,128256",
            "middle": "8192,2048,151936",
            "narrow": "32768,896,151936",
            "shard": "16384,4096,16032",
            "odd": "8192,2048,151665",
            "few": "512,4096,128256",
        },
        "cpu": {"few": "64,64,1000"},
    }
    few = [] if device == "cuda" else ["--repeats", 1]
    return [
        Piece(f"token_stats_{name}", module("token_stats", "--shape", shape, "--dtype", "bf16", *few), LIMIT)
        for name, shape in shapes[device].items()
    ]


def learner_pieces(device: str, models: Path) -> list[Piece]:
    """Seconds and memory of an update: prompts packed once a group, against padded and packed rows."""
    if device == "cpu":
        work = ("--prompt", 48, "--groups", 1, "--length", 16, "--repeats", 1)
        return [Piece("learner_g8", module("learner", "--model", models / "tiny", *work), LIMIT)]
    return [
        Piece(
            f"learner_g{size}_p{prompt}",
            module(
                "learner", "--model", models / "0.5b", "--prompt", prompt, "--size", size, "--groups", 4,
                "--length", 256, "--microbatch-tokens", 4 * size * (prompt + 256), "--repeats", 5,
            ),
            LIMIT,
        )
        for size in (8, 16)
        for prompt in (512, 2048, 8192)
    ]  # fmt: skip


def step_pieces(device: str, work: Path, trl: str | None) -> list[Piece]:
    """The seconds of whole steps of models with random weights, by phase."""
    shapes = ("0.5b", "1.5b") if device == "cuda" else ("tiny",)
    case = ("--case", "512:256", "--microbatch-tokens", 32768) if device == "cuda" else ("--case", "64:8")
    case += ("--ceilings", work / "ceilings.json", *(("--trl-python", trl) if trl else ()))
    return [
        Piece(f"step_{shape}", module("grpo_step", "--model", work / "models" / shape, *case), LIMIT)
        for shape in shapes
    ]


def learning_pieces(device: str, work: Path) -> list[Piece]:
    """Training runs of the real model with uniform and knapsack budgets; only two steps on a CPU."""
    model = small_model_path()
    arms = ("--arms", "uniform", "knapsack", "--seeds", 0, "--runs", work / "runs")
    if device == "cuda":
        return [Piece("knapsack", module("knapsack_run", "--model", model, *arms), LIMIT)]
    adder = work / "models" / "adder"
    small = ("--config", adder / "config.yaml", "--set", "steps=2", "eval.max_prompts=4", "eval.every=0")
    return [Piece("knapsack", module("knapsack_run", "--model", adder / "model", *small, *arms), LIMIT)]


def pieces_for(device: str, work: Path, trl: str | None = None) -> list[Piece]:
    models, shapes = work / "models", ("0.5b", "1.5b") if device == "cuda" else ("tiny",)
    making = [
        Piece(f"model_{shape}", module("random_model", models / shape, "--shape", shape), LIMIT)
        for shape in shapes
    ]
    if device == "cpu":
        making.append(Piece("model_adder", module("small_adder", models / "adder", "--lessons", 20), LIMIT))
    return [
        Piece("ceilings", module("ceilings"), LIMIT),
        *test_pieces(),
        *token_stats_pieces(device),
        *making,
        *learner_pieces(device, models),
        *step_pieces(device, work, trl),
        *learning_pieces(device, work),
    ]


def machine_and_packages() -> dict[str, Any]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return machine() | {"packages": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none that may end later")
    parser.add_argument("--only", nargs="+", help="the pieces whose names begin so")
    parser.add_argument("--trl-python")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = options.work.resolve()
    pieces = pieces_for(device, work, options.trl_python)
    if options.only:
        pieces = [piece for piece in pieces if piece.name.startswith(tuple(options.only))]
    place = Place(options.results, work, machine_and_packages(), {"HF_HUB_OFFLINE": "1"})
    sys.exit(exit_code(run_pieces(pieces, place, seconds=options.seconds)))


if __name__ == "__main__":
    main()
