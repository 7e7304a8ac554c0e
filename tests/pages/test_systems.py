"""docs/systems.md names configs, modules, algorithms and pages that exist."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf.algos.table import ALGORITHMS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "systems.md").read_text()


def test_every_path_and_command_exists():
    paths = set(re.findall(r"\b(?:configs|rlhf|examples|tests|docs)/[\w/.]+\.(?:yaml|py|png)", TEXT))
    assert len(paths) > 25
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    modules = set(re.findall(r"\bbenchmarks\.(\w+)", TEXT))
    assert [m for m in sorted(modules) if not (ROOT / "benchmarks" / f"{m}.py").exists()] == []
    links = set(re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXT))
    assert [link for link in sorted(links) if not (ROOT / "docs" / link).exists()] == []


def test_every_algorithm_it_names_exists():
    named = set(re.findall(r"algorithm=(\w+)", TEXT))
    rows = [line.split("|") for line in TEXT.splitlines() if line.startswith("| ") and "arxiv.org" in line]
    named |= {row[2].strip(" `") for row in rows if re.fullmatch(r"`\w+`", row[2].strip())}
    assert len(rows) > 40 and len(named) > 25
    assert named - ALGORITHMS.keys() == set()


def test_every_table_row_has_a_paper_a_place_a_command_a_claim_and_a_measurement():
    for line in TEXT.splitlines():
        if line.startswith("| ") and "arxiv.org" in line:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 5 and all(cells), line
