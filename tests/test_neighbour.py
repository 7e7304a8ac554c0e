"""No clashes with the standard library or the package `kernels`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("kernels", "rollout", "algos")


def run(*arguments: str | Path, cwd: Path, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
    )


# -S: an editable installation imports the standard library's `types` before the script starts
def test_run_as_a_file_the_entry_point_does_not_hide_the_types_of_the_standard_library(
    tmp_path: Path,
) -> None:
    installed = tuple(Path(entry) for entry in sys.path if entry.endswith("site-packages"))
    done = run("-S", ROOT / "rlhf" / "train.py", "no_such_config.yaml", cwd=tmp_path, path=installed)
    assert done.returncode != 0
    assert "no_such_config.yaml" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr, done.stderr


def test_without_its_first_lines_the_entry_point_would_hide_them(tmp_path: Path) -> None:
    (tmp_path / "types.py").symlink_to(ROOT / "rlhf" / "types.py")
    (tmp_path / "entry.py").write_text("import enum\n")
    done = run("-S", tmp_path / "entry.py", cwd=tmp_path)
    assert done.returncode != 0 and str(tmp_path / "types.py") in done.stderr


@pytest.mark.parametrize("foreign_first", [True, False])
def test_another_package_named_kernels_wins_and_ours_is_still_there(
    tmp_path: Path, foreign_first: bool
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("MINE = False\n")
    script = """
import kernels
assert kernels.MINE is False
import transformers.modeling_utils
import rlhf.kernels.backend
"""
    path = (tmp_path, ROOT) if foreign_first else (ROOT, tmp_path)
    done = run("-c", script, cwd=tmp_path, path=path)
    assert done.returncode == 0, done.stderr


def test_our_folder_kernels_is_not_taken_for_the_package_kernels() -> None:
    script = """
import transformers.modeling_utils
from transformers.utils import is_kernels_available
assert not is_kernels_available()
"""
    # an isolated interpreter sees the installed packages and, put first by hand, our folder
    done = run("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}", cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr


def test_the_folders_are_linked_and_kernels_is_no_regular_package() -> None:
    for name in LINKED:
        assert (ROOT / "rlhf" / name).is_symlink()
        assert os.readlink(ROOT / "rlhf" / name) == f"../{name}"
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for name in ("rollout", "algos"):
        body = ast.parse((ROOT / name / "__init__.py").read_text()).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{name}/__init__.py is a docstring only"
