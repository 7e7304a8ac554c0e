"""`Saver`: checkpoints in the background, the best ones kept, and every failure reported in time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf.checkpoints.store
from rlhf.checkpoints.saver import Saver
from rlhf.checkpoints.stateful import CheckpointError, Stateful, TensorFiles
from rlhf.checkpoints.store import latest, load
from rlhf.config.run import CheckpointConfig
from rlhf.distributed.world import World
from tests.support import ALONE


class Part(Stateful):
    """One tensor and one number."""

    def __init__(self, value: float) -> None:
        self.weight, self.count = torch.full((1000,), value), int(value)

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"model": {"weight": self.weight}}

    def load(self, state: Mapping[str, Any], tensors: TensorFiles) -> None:
        self.count, self.weight = state["count"], tensors["model"]["weight"]


def saver(folder: Path, *, background: bool = False, **changes: Any) -> Saver:
    section = CheckpointConfig.model_validate({"background": background, "keep_last": 2} | changes)
    return Saver(folder, section, ALONE, timeout=5.0)


def steps(folder: Path) -> list[int]:
    return sorted(
        int(path.name.removeprefix("step_")) for path in folder.glob("step_*") if "tmp" not in path.name
    )


@pytest.mark.parametrize("background", [False, True])
def test_what_was_saved_comes_back(tmp_path: Path, background: bool) -> None:
    writer, part = saver(tmp_path, background=background), Part(7)
    writer.save(3, {"part": part})
    # the run goes on and changes what is being written
    part.weight.fill_(8.0)
    part.count = 8
    writer.wait()
    newest, back = writer.newest(), Part(0)
    assert newest == tmp_path / "step_000003"
    assert newest is not None
    writer.resume(newest, {"part": back})
    if background:
        assert back.weight.eq(7).all()
    assert back.count == 7


def test_the_step_after_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, written = threading.Event(), rlhf.checkpoints.store.save_file

    def slow(*arguments: Any) -> None:
        assert disk.wait(60)
        written(*arguments)

    monkeypatch.setattr(rlhf.checkpoints.store, "save_file", slow)
    writer = saver(tmp_path, background=True)
    writer.save(1, {"part": Part(1)})
    assert latest(tmp_path) is None, "it came back before the file was written"
    disk.set()
    writer.save(2, {"part": Part(2)})
    writer.wait()
    assert steps(tmp_path) == [1, 2]


def test_a_failure_in_the_background_is_told_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = saver(tmp_path, background=True)
    writer.save(1, {"part": Part(1)})
    writer.wait()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rlhf.checkpoints.store, "save_file", full)
    writer.save(2, {"part": Part(2)})
    with pytest.raises(CheckpointError, match=r"step 2 could not be written.*No space left"):
        writer.wait()
    assert steps(tmp_path) == [1] and not list(tmp_path.glob("*.tmp-*"))
    writer.check()


def test_the_best_are_kept_beside_the_last(tmp_path: Path) -> None:
    writer = saver(tmp_path, keep_last=2, keep_best=1)
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.5), (4, None), (5, 0.3), (6, None)):
        writer.save(step, {"part": Part(step)}, score=score)
    assert steps(tmp_path) == [2, 5, 6]
    # of equal scores the newest is kept
    writer.save(7, {"part": Part(7)}, score=0.9)
    assert steps(tmp_path) == [6, 7]


def test_a_damaged_one_is_named_and_the_one_before_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = saver(tmp_path)
    for step in (1, 2):
        writer.save(step, {"part": Part(step)})
    file = tmp_path / "step_000002" / "part.model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert writer.newest() == tmp_path / "step_000001"
    assert "part.model.safetensors: digest differs" in caplog.text and "passed over" in caplog.text


def test_a_rank_that_has_not_written_its_part_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Saver(tmp_path, CheckpointConfig(), ALONE, timeout=0.1)
    monkeypatch.setattr("rlhf.checkpoints.saver.is_sharded", lambda tensor: True)
    monkeypatch.setattr("rlhf.checkpoints.saver.savers", lambda tensor: [0, 3])
    with pytest.raises(CheckpointError, match=r"rank 3 has not written its part .* Do all ranks see"):
        writer.save(1, {"part": Part(1)})
    assert steps(tmp_path) == [] and latest(tmp_path) is None


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """What a checkpoint holds are tensors and JSON, all of it listed in the manifest."""
    writer = saver(tmp_path)
    writer.save(1, {"part": Part(1)})
    folder = tmp_path / "step_000001"
    names = {path.name for path in folder.iterdir()}
    assert names == {"part.model.safetensors", "state.json", "manifest.json"}
    saved = load(folder, device="cpu")
    assert saved.state == {"part": {"count": 1}} and set(saved.tensors) == {"part.model"}


def test_on_a_gpu_it_is_in_the_background_unless_set(tmp_path: Path) -> None:
    assert not Saver(tmp_path, CheckpointConfig(), ALONE, timeout=1.0).background
    elsewhere = World(0, 1, torch.device("cuda", 0))
    assert Saver(tmp_path, CheckpointConfig(), elsewhere, timeout=1.0).background


@pytest.mark.parametrize("background", [False, True])
def test_whatever_stops_a_save_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    def fail(*arguments: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(rlhf.checkpoints.store, "save_file", fail)
    writer = saver(tmp_path / "checkpoints", background=background)
    with pytest.raises(MemoryError, match="no memory"):
        writer.save(1, {"part": Part(1)})
        writer.wait()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_step_of_a_checkpoint_is_what_its_manifest_says(tmp_path: Path) -> None:
    writer = saver(tmp_path, keep_last=3)
    for step in (2, 4):
        writer.save(step, {"part": Part(step)})
    (tmp_path / "step_000002").rename(tmp_path / "step_000009")
    assert writer.newest() == tmp_path / "step_000004"
    writer.save(6, {"part": Part(6)})
    # the renamed one is of step 2: it is neither the newest nor of a later step
    assert steps(tmp_path) == [4, 6, 9]


@pytest.mark.parametrize("change", [('"format": 2', '"format": 3'), ('"step": 8', '"step": 7')])
def test_what_cannot_be_read_is_never_removed(tmp_path: Path, change: tuple[str, str]) -> None:
    """A checkpoint of a newer version, and one whose manifest is damaged."""
    writer = saver(tmp_path, keep_last=1)
    writer.save(8, {"part": Part(8)})
    manifest = tmp_path / "step_000008" / "manifest.json"
    assert change[0] in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(*change))
    writer.save(1, {"part": Part(1)})
    writer.save(2, {"part": Part(2)})
    assert steps(tmp_path) == [2, 8]
    assert writer.newest() == tmp_path / "step_000002"
    assert len(writer.passed_over) == 1 and "step_000008" in writer.passed_over[0]


def test_all_files_of_a_checkpoint_have_the_permissions_of_new_files(tmp_path: Path) -> None:
    saver(tmp_path).save(1, {"part": Part(1)})
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "step_000001").iterdir()}
    assert len(modes) == 3 and set(modes.values()) == {expected}, modes


class Saved:
    """Stands in for a model or a tokenizer."""

    def save_pretrained(self, save_directory: str) -> None:
        (Path(save_directory) / "config.json").write_text("{}")


@pytest.mark.parametrize("exists", [True, False])
def test_an_export_to_a_link_fills_the_folder_that_it_names(tmp_path: Path, exists: bool) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    if exists:
        disk.mkdir()
    link.symlink_to(disk)
    rlhf.checkpoints.store.export(Saved(), Saved(), link)
    assert link.is_symlink() and (disk / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
