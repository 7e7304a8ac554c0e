"""Six steps of a seeded run of the tiny Llama, compared with the figures in tests/golden/grpo_tiny.json.

They move when the algorithm, the sampling or the optimizer does. A change that means to move them writes the
file anew with `python -m tests.e2e.test_golden`, and its commit says why.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.conftest import save_tiny_model
from tests.support import bandit_settings, metrics_of, train

GOLDEN = Path(__file__).parents[1] / "golden" / "grpo_tiny.json"
NAMES = ("reward/mean", "entropy", "grad_norm", "kl/old", "loss/policy", "length/mean")


@pytest.fixture(scope="module", autouse=True)
def draws_figures() -> None:
    """The report of this run has its figures."""


def figures(folder: Path, model_dir: Path) -> dict[str, list[float]]:
    """The metrics of each step. With only one update a step, the KL to the old policy would be 0."""
    train(bandit_settings(folder, model_dir, steps=6, learner={"minibatches": 2}))
    records = metrics_of(folder)
    return {name: [record[name] for record in records] for name in NAMES}


def test_a_seeded_run_makes_the_figures_it_always_made(tmp_path: Path, tiny_model_dir: Path):
    got, golden = figures(tmp_path, tiny_model_dir), json.loads(GOLDEN.read_text())
    assert (tmp_path / "run" / "report.html").read_text().count("<svg") > 5
    assert got.keys() == golden.keys()
    for name, values in golden.items():
        assert got[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name


def write() -> None:
    with TemporaryDirectory() as folder:
        model_dir = Path(folder, "model")
        model_dir.mkdir()
        save_tiny_model(model_dir, "llama")
        GOLDEN.write_text(json.dumps(figures(Path(folder), model_dir), indent=2) + "\n")
    sys.stdout.write(f"{GOLDEN}\n")


if __name__ == "__main__":
    write()
