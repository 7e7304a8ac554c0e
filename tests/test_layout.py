"""The layout of the code: allowed imports, lengths of files and functions, imports without side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("rlhf", "kernels", "rollout", "algos")
OPTIONAL = ("vllm", "triton", "flash_attn", "math_verify", "reasoning_gym", "peft", "wandb", "trackio")

# a file may import its own package and those before it in this list
ROOMS = (
    "rlhf.tensors",
    "rlhf.types",
    "rlhf.metrics",
    "rlhf.files",
    "rlhf.plugins",
    "rlhf.devices",
    "rlhf.torch_typed",
    "rlhf.interrupt",
    "rlhf.out_of_memory",
    "rlhf.small_model",
    "rlhf.kernels",
    "rlhf.algos",
    "rlhf.config",
    "rlhf.compute_dtype",
    "rlhf.sandbox",
    "rlhf.distributed",
    "rlhf.rollout",
    "rlhf.checkpoints",
    "rlhf.models",
    "rlhf.rewards",
    "rlhf.environments",
    "rlhf.data",
    "rlhf.inputs",
    "rlhf.sync",
    "rlhf.learn",
    "rlhf.collect",
    "rlhf.evaluation",
    "rlhf.monitoring",
    "rlhf.preflight",
    "rlhf.migrate",
    "rlhf.components",
    "rlhf.loop",
    "rlhf.reward_model",
    "rlhf.trainer",
    "rlhf.pairs",
    "rlhf.commands",
    "rlhf.cli",
    "rlhf.__main__",
    "rlhf.train",
)
# packages that may import less than their position in the list allows
NARROW = {
    "rlhf.kernels": (),
    "rlhf.algos": ("rlhf.tensors", "rlhf.types", "rlhf.metrics", "rlhf.kernels"),
    "rlhf.rollout": (
        "rlhf.tensors",
        "rlhf.types",
        "rlhf.metrics",
        "rlhf.plugins",
        "rlhf.devices",
        "rlhf.kernels",
        "rlhf.config",
    ),
    "rlhf.train": ("rlhf.cli",),
}
# rlhf/__init__.py, which imports the public names when they are first used
PACKAGE = "rlhf"


def files() -> list[Path]:
    return sorted(file for folder in FOLDERS for file in walk(ROOT / folder))


def walk(folder: Path) -> Iterator[Path]:
    """The Python files of a folder and its subfolders, without links to other folders."""
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
    """The statements that run when the module is imported; those under `if TYPE_CHECKING` do not."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_module_level(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            yield from at_module_level([n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)])


def room(name: str) -> str:
    """The sub-package of a module, or the module itself where it is directly in rlhf/."""
    return ".".join(name.split(".")[:2])


OURS = {
    name: {m for m in imports(tree, inside_functions=True) if m.split(".")[0] == "rlhf"}
    for name, tree in TREES.items()
}


def test_every_file_has_a_room() -> None:
    assert {room(name) for name in MODULES} - {PACKAGE} == set(ROOMS)


@pytest.mark.parametrize("name", [name for name in MODULES if name != PACKAGE])
def test_a_module_imports_its_own_room_and_those_below(name: str) -> None:
    mine = room(name)
    allowed = {mine, *NARROW.get(mine, ROOMS[: ROOMS.index(mine)])}
    assert {m for m in OURS[name] if room(m) not in allowed} == set()


def test_there_are_no_import_cycles() -> None:
    graph = {name: {m for m in found if m in MODULES} for name, found in OURS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("folder", sorted({file.parent for file in MODULES.values()}))
def test_a_folder_has_few_files(folder: Path) -> None:
    assert len(list(folder.glob("*.py"))) <= 18


def test_the_tests_mirror_the_folders() -> None:
    tests = ROOT / "tests"
    assert all(
        len(list(folder.glob("*.py"))) <= 25 for folder in (tests, *tests.rglob("*")) if folder.is_dir()
    )
    rooms = {name.removeprefix("rlhf.") for name in ROOMS if name != "rlhf.inputs"}
    packages = {r for r in rooms if (ROOT / "rlhf" / r).is_dir()}
    assert packages <= {folder.name for folder in tests.iterdir() if folder.is_dir()}


@pytest.mark.parametrize("name", MODULES)
def test_the_only_import_name_is_rlhf(name: str) -> None:
    assert {m.split(".")[0] for m in imports(TREES[name], inside_functions=True)}.isdisjoint(FOLDERS[1:])


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("rlhf.algos")])
def test_algorithms_are_functions_on_tensors(name: str) -> None:
    assert "torch.distributed" not in set(imports(TREES[name], inside_functions=True))


# files of Triton kernels need triton; they are imported only by the functions that run a kernel
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
