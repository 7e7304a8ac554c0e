"""The comparison of runs: seeds share a band, differing settings are listed, nothing is left out silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rlhf.cli import main
from rlhf.monitoring.records import append_eval
from rlhf.monitoring.report.comparison import band_of, grouped, read_run, render
from rlhf.monitoring.run_folder import RunFolder
from tests.monitoring.test_report import Page, evaluation, given_pairs, paired, step


def make_run(folder: Path, *, lr: float, seed: int, level: float) -> Path:
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    entries = [step(n, **{"reward/mean": level * n, "time/step": 3.0}) for n in range(1, 6)]
    run.metrics.write_text("".join(json.dumps(e) + "\n" for e in entries))
    settings = {"run_dir": str(folder), "seed": seed, "learner": {"lr": lr}, "algorithm": {"name": "grpo"}}
    run.config.write_text(yaml.safe_dump(settings))
    for n in (0, 3, 5):
        append_eval(run, evaluation(n, min(1.0, 0.1 + level * n)))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = [
        make_run(tmp_path / f"slow-{seed}", lr=1e-6, seed=seed, level=0.01 + 0.01 * seed) for seed in (0, 1)
    ]
    return [*made, make_run(tmp_path / "fast", lr=1e-5, seed=0, level=0.1)]


def test_runs_that_differ_in_seed_and_folder_alone_are_one_band(folders: list[Path]) -> None:
    groups = grouped([read_run(folder) for folder in folders])
    assert [[run.name for run in group] for group in groups] == [["slow-0", "slow-1"], ["fast"]]
    band = band_of("slow", groups[0], "reward/mean")
    assert band is not None
    assert band.mean == pytest.approx([0.015 * n for n in range(1, 6)])
    assert list(band.low) == pytest.approx([0.01 * n for n in range(1, 6)])
    assert list(band.high) == pytest.approx([0.02 * n for n in range(1, 6)])


def test_only_steps_that_all_seeds_have_are_drawn(folders: list[Path]) -> None:
    stream = folders[1] / "metrics.jsonl"
    stream.write_text("".join(stream.read_text().splitlines(keepends=True)[:3]))
    band = band_of("slow", [read_run(folder) for folder in folders[:2]], "reward/mean")
    assert band is not None and list(band.steps) == [1, 2, 3]


def test_the_page_shows_the_outcome_of_each_run_and_the_settings_that_differ(folders: list[Path]) -> None:
    page = Page(render([read_run(folder) for folder in folders]))
    assert page.open == []
    assert "slow-0 and 1 more seeds" in page.text and "learner.lr" in page.text and "1e-06" in page.text
    assert "run_dir" not in page.text and "Lines are means over the seeds" in page.text
    labels = [attrs["aria-label"] for tag, attrs in page.starts if tag == "svg"]
    assert "Accuracy on held-out prompts" in labels and "Reward, mean of a step" in labels
    assert "accuracy rose" in page.text


def test_pairs_and_samples_are_compared_in_figures_of_their_own(folders: list[Path], tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "pairs")
    run.path.mkdir()
    run.metrics.write_text("".join(json.dumps(given_pairs(n, 0.5)) + "\n" for n in (1, 2)))
    for record in (paired(0, 0.5), paired(2, 0.9)):
        append_eval(run, record)
    alone = Page(render([read_run(run.path)]))
    assert "pair accuracy 0.500 pair accuracy 0.900 0.850 to 0.950" in " ".join(alone.text.split())
    assert "pair accuracy rose" in alone.text
    labels = [attrs["aria-label"] for tag, attrs in alone.starts if tag == "svg"]
    assert "Pair accuracy on held-out pairs" in labels and "Loss of the pairs" in labels
    assert not {"Accuracy on held-out prompts", "Reward, mean of a step"} & set(labels)
    both = Page(render([read_run(folder) for folder in (*folders, run.path)]))
    labels = [attrs["aria-label"] for tag, attrs in both.starts if tag == "svg"]
    assert {
        "Accuracy on held-out prompts",
        "Pair accuracy on held-out pairs",
        "Reward, mean of a step",
    } <= set(labels)


def test_a_comparison_replaces_its_own_page_and_no_other_file(
    folders: list[Path], tmp_path: Path, capsys
) -> None:
    page, note = tmp_path / "page.html", tmp_path / "note.html"
    note.write_text("<p>mine</p>")
    command = ["report", *map(str, folders), "--out"]
    assert main([*command, str(page)]) == 0 and main([*command, str(page)]) == 0
    assert main([*command, str(note)]) == 2
    assert "nothing was overwritten" in capsys.readouterr().err and note.read_text() == "<p>mine</p>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "RUN"], "must be different folders"),
        (["EMPTY"], "holds no run"),
        (["RUN", "--out", "x.html"], "for comparisons"),
    ],
)
def test_what_cannot_be_compared_is_named(
    folders: list[Path], tmp_path: Path, arguments: list[str], message: str, capsys
) -> None:
    names = {"RUN": folders[0], "EMPTY": tmp_path}
    assert main(["report", *(str(names.get(a, a)) for a in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_one_run_gets_its_own_page_anew(folders: list[Path], capsys) -> None:
    assert main(["report", str(folders[2])]) == 0
    assert (folders[2] / "report.html").is_file()
    assert "It learned" in capsys.readouterr().out
