"""Importing the kernels costs nothing that a machine may lack."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
sys.modules["triton"] = None  # importing it is an error
import torch
from rlhf.kernels.gae import gae
from rlhf.kernels.token_stats import logit_stats, token_stats
assert not torch.cuda.is_initialized()
stats = token_stats(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4]))
assert stats.logprob is not None
"""


def test_a_machine_without_triton_imports_and_runs_them() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
