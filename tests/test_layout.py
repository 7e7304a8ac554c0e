"""The shape of the house: who imports whom, how long a file may be, and that an import does no work."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("rlhf", "kernels", "rollout", "algos")
OPTIONAL = ("vllm", "triton", "flash_attn", "math_verify", "reasoning_gym", "peft", "wandb", "trackio")

# module (the first match counts) -> what of ours it may import; the rest of rlhf/ may import all but ENTRY
MAY_IMPORT = {
    "rlhf.types": (),
    "rlhf.metrics": (),
    "rlhf.kernels*": ("rlhf.kernels*",),
    "rlhf.algos*": ("rlhf.types", "rlhf.metrics", "rlhf.kernels*", "rlhf.algos*"),
    "rlhf.rollout*": (
        "rlhf.types",
        "rlhf.metrics",
        "rlhf.config",
        "rlhf.plugins",
        "rlhf.kernels*",
        "rlhf.rollout*",
    ),
    "rlhf.train": ("rlhf.cli",),
    "*": ("rlhf*",),
}
ENTRY = {"rlhf.trainer", "rlhf.train", "rlhf.cli"}


def files() -> list[Path]:
    return sorted(file for folder in FOLDERS for file in walk(ROOT / folder))


def walk(folder: Path) -> Iterator[Path]:
    """Python files of a folder, links to other folders left out."""
    for entry in folder.iterdir():
        if entry.suffix == ".py":
            yield entry
        elif entry.is_dir() and not entry.is_symlink():
            yield from walk(entry)


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "rlhf" else ("rlhf", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in files()}
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}


def imports(tree: ast.Module, *, inside_functions: bool) -> Iterator[str]:
    """Modules that are imported: `from rlhf.a import b` means `rlhf.a.b` where that is a module."""
    nodes = ast.walk(tree) if inside_functions else at_module_level(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)


def at_module_level(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """What runs when the module is imported: `if TYPE_CHECKING` does not."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_module_level(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            yield from at_module_level([n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)])


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_its_place_allows(name: str) -> None:
    allowed = next(patterns for module, patterns in MAY_IMPORT.items() if fnmatchcase(name, module))
    ours = {m for m in imports(TREES[name], inside_functions=True) if m.split(".")[0] == "rlhf"}
    wrong = {m for m in ours if not any(fnmatchcase(m, pattern) for pattern in allowed)}
    assert not wrong, f"{name} may import {allowed}"


def test_only_the_entry_points_know_the_trainer() -> None:
    known = {name: ENTRY.intersection(imports(tree, inside_functions=True)) for name, tree in TREES.items()}
    assert {name for name, entry in known.items() if entry} <= {
        "rlhf",
        "rlhf.__main__",
        "rlhf.cli",
        "rlhf.train",
    }


@pytest.mark.parametrize("name", MODULES)
def test_the_only_import_name_is_rlhf(name: str) -> None:
    assert {m.split(".")[0] for m in imports(TREES[name], inside_functions=True)}.isdisjoint(FOLDERS[1:])


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("rlhf.algos")])
def test_algorithms_are_functions_on_tensors(name: str) -> None:
    assert "torch.distributed" not in set(imports(TREES[name], inside_functions=True))


# a file of Triton kernels cannot do without triton; it is imported by the function that runs one
@pytest.mark.parametrize("name", [name for name in MODULES if "triton" not in name])
def test_nothing_optional_is_imported_with_a_module(name: str) -> None:
    at_once = {m.split(".")[0] for m in imports(TREES[name], inside_functions=False)}
    assert at_once.isdisjoint(OPTIONAL)


def test_everything_imports_without_the_optional_packages_and_asks_no_device() -> None:
    names = [name for name in MODULES if "triton" not in name]
    script = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules.update(dict.fromkeys({OPTIONAL!r}))
for name in {names!r}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("name", MODULES)
def test_a_file_is_short_enough_to_read(name: str) -> None:
    longest = 250 if name == "rlhf.trainer" else 350 if name.startswith("rlhf.kernels") else 400
    assert len(MODULES[name].read_text().splitlines()) <= longest


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("rlhf.kernels")])
def test_a_function_is_short_enough_to_read(name: str) -> None:
    functions = (n for n in ast.walk(TREES[name]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    lengths = {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions}
    assert {name: length for name, length in lengths.items() if length > 50} == {}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(TREES[name])
