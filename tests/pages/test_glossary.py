"""Every metric that a run writes is explained in docs/metrics.md."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.load import make_config
from rlhf.trainer import Trainer
from tests.support import bandit_settings

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "metrics.md"
NAME = re.compile(r"[a-z_]+(/[a-z0-9_]*[a-z0-9])+")


def glossary_rows(path: Path) -> list[list[str]]:
    """The cells of every row that explains a metric: name, unit, meaning, healthy, if not."""
    rows = [line for line in path.read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row.strip()[1:-1].split("|")] for row in rows]


def glossary_names(path: Path) -> list[str]:
    """The names of a glossary, in order; `<objective>` stands for any name."""
    return [row[0].strip("`") for row in glossary_rows(path)]


def is_explained(name: str) -> bool:
    patterns = (re.sub(r"<\w+>", "[^/]+", known) for known in glossary_names(GLOSSARY))
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def test_the_glossary_explains_each_name_once() -> None:
    names = glossary_names(GLOSSARY)
    assert len(names) == len(set(names)) > 40
    for row in glossary_rows(GLOSSARY):
        assert row[2], f"{row[0]} has no meaning"


def test_every_name_in_the_code_is_explained() -> None:
    files = [file for folder in ("rlhf", "algos", "rollout") for file in (ROOT / folder).rglob("*.py")]
    literals = {
        node.value
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value)
    }
    assert "reward/mean" in literals
    assert [
        name
        for name in sorted(literals - {"application/json", "left/right", "above/below"})
        if not is_explained(name)
    ] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": {"name": "grpo", "kl": {"coef": 0.01, "estimator": "exact"}, "clip_dual": 3.0}},
        {"algorithm": {"name": "sapo"}, "learner": {"epochs": 2}},
    ],
    ids=["grpo", "sapo"],
)
def test_every_name_a_run_writes_is_explained(
    tmp_path: Path, tiny_model_dir: Path, changes: dict[str, Any]
) -> None:
    settings = bandit_settings(tmp_path, tiny_model_dir, **changes)
    settings |= {"steps": 2, "checkpoint": {"export": False, "every": 1}}
    settings["data"]["eval"] = settings["data"]["train"]
    Trainer(make_config(settings)).run()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    names = {name for line in lines for name in json.loads(line)} - {"step"}
    assert {"reward/mean", "entropy", "grad_norm", "time/step", "time/save"} <= names
    assert [name for name in sorted(names) if not is_explained(name)] == []
