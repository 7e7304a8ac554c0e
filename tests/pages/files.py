"""The list of every file in docs/architecture.md, made from the first sentences of packages and modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
HEAD = """## Every file

<!-- written by `make docs` from the docstrings of packages and modules; edit them there -->
"""
# as data flows, each folder with the folders in it
FOLDERS = (
    "rlhf",
    "rlhf/config",
    "rlhf/data",
    "rlhf/collect",
    "rlhf/rewards",
    "rlhf/sandbox",
    "rlhf/learn",
    "rlhf/models",
    "rlhf/sync",
    "rlhf/distributed",
    "rlhf/checkpoints",
    "rlhf/evaluation",
    "rlhf/monitoring",
    "rlhf/preflight",
    "rlhf/reward_model",
    "rlhf/pairs",
    "rlhf/commands",
    "algos",
    "kernels",
    "rollout",
)


def render() -> str:
    """The page, its list of files made anew."""
    return PAGE.read_text().partition(HEAD)[0] + HEAD + "".join(_lines())


def _lines() -> Iterator[str]:
    for name in FOLDERS:
        folder = ROOT / name
        yield from _table(folder)
        if name != "rlhf":
            for inner in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
                if inner.name != "__pycache__":
                    yield from _table(inner)


def _table(folder: Path) -> Iterator[str]:
    name, package = folder.relative_to(ROOT), folder / "__init__.py"
    yield f"\n### {name}/\n\n"
    if package.is_file():
        yield f"{_first_sentences(package)}\n\n"
    yield "| file | what it is |\n|---|---|\n"
    for file in sorted(folder.glob("*.py")):
        if file != package:
            yield f"| `{name}/{file.name}` | {_first_sentences(file).replace('|', '/')} |\n"


def _first_sentences(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(docstring.partition("\n\n")[0].split())
