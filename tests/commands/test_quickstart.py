"""`rlhf quickstart`, in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.commands.start import quickstart
from rlhf.commands.start.quickstart import quickstart_config
from rlhf.config.section import ConfigError
from rlhf.small_model import SmallModelError

SHORT = ["steps=1", "eval.max_prompts=2", "rollout.prompts_per_step=2", "rollout.group_size=2"]


def test_it_writes_its_run_into_the_current_folder(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "make_small_model", lambda: tiny_model_dir)
    more = [
        "model.dtype=float32",
        "data.max_prompt_tokens=128",
        "checkpoint.export=false",
        "monitor.sinks=[]",
    ]
    assert main(["quickstart", *SHORT, *more]) == 0, capsys.readouterr().err
    assert len((tmp_path / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()) == 1
    assert main(["quickstart", *SHORT, *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rlhf quickstart: ") and "runs/quickstart" in said


@pytest.mark.parametrize("given", ["model.path=my/model", "model=my/model", "model={path: my/model}"])
def test_a_model_of_ones_own_needs_no_small_one(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise SmallModelError("run: pip install it")

    monkeypatch.setattr(quickstart, "make_small_model", missing)
    assert quickstart_config([given, "rollout.group_size=4"]).rollout.group_size == 4
    with pytest.raises(ConfigError, match="run: pip install it"):
        quickstart_config(["rollout.group_size=4"])
    with pytest.raises(ConfigError, match=r"did you mean rollout\.group_size"):
        quickstart_config([given, "rollout.group_sise=4"])
