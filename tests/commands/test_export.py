"""`rlhf export`: the weights of a checkpoint, whole, merged, or the adapter alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.cli import main


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def assert_same(a: Path, b: Path) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_an_export_of_the_last_checkpoint_is_the_model_the_run_wrote(
    finished_run: Path, tmp_path: Path, capsys
):
    assert main(["export", str(finished_run), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert_same(tmp_path / "out", finished_run / "model")
    # an earlier export is replaced, anything else is kept
    assert main(["export", str(finished_run), str(tmp_path / "out")]) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    assert main(["export", str(finished_run), str(tmp_path / "other")]) == 2
    assert "nothing was overwritten" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_a_model_trained_whole_has_no_adapter_and_a_model_is_no_run(
    finished_run: Path, tmp_path: Path, capsys
):
    assert main(["export", str(finished_run), str(tmp_path / "out"), "--adapter"]) == 2
    assert "no adapter" in capsys.readouterr().err
    assert main(["export", str(finished_run / "model"), str(tmp_path / "out")]) == 2
    assert "is a model already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_exported_alone_and_merged(
    adapter_run: Path, tmp_path: Path, tiny_model_dir: Path, capsys
):
    peft, run = pytest.importorskip("peft"), adapter_run
    assert main(["export", str(run), str(tmp_path / "merged")]) == 0, capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert_same(tmp_path / "merged", run / "model")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    joined = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, weight in weights(tmp_path / "merged").items():
        torch.testing.assert_close(joined[name], weight, rtol=1e-5, atol=1e-6)
