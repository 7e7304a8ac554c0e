"""Runs `interpreted.py` in a process in which Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

# Triton 3.6's interpreter calls int() on an array of one element for the bound of a loop
DEPRECATED = "ignore:Conversion of an array with ndim:DeprecationWarning"


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


@pytest.mark.skipif(
    numbers(triton.__version__) < (3, 7) and numbers(version("numpy")) >= (2, 4),
    reason="the interpreter of Triton 3.6 needs NumPy < 2.4",
)
def test_the_triton_kernels_are_right_in_the_interpreter() -> None:
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", DEPRECATED]
    done = subprocess.run(
        [*command, str(folder / "interpreted.py")],
        cwd=folder.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
