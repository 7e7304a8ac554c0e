"""Every file of a checkpoint, damaged in every way, and ranks that hang: `make test-faults`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.kills import STUCK, Straight, resumed
from tests.faults.processes import Fault, launch, settings_of

FILES = ("policy.model.safetensors", "policy.optimizer.safetensors", "state.json", "manifest.json")
SHARDS = ("policy.model.rank00001.safetensors", "policy.optimizer.rank00000.safetensors")


def flip(place: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(place * (len(content) - 1))] ^= 0x10
        file.write_bytes(content)

    return damage


def cut(share: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first byte": flip(0.0),
    "a tenth in": flip(0.1),
    "middle": flip(0.5),
    "last byte": flip(1.0),
    "cut in half": cut(0.5),
    "last byte missing": cut(0.999),
    "empty": cut(0.0),
    "missing": Path.unlink,
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Callable[[int, str], Path]:
    """`stopped(ranks, kind)`: the folder of a run that was killed in its last step, with two checkpoints."""
    made: dict[tuple[int, str], Path] = {}

    def folder(ranks: int, kind: str) -> Path:
        if (ranks, kind) not in made:
            path = tmp_path_factory.mktemp(f"stopped-{kind}")
            fault = Fault("torch.autograd:backward", 8)
            launch(settings_of(path, tiny_model_dir, kind), path / "log", ranks=ranks, fault=fault)
            names = sorted(p.name for p in (path / "run" / "checkpoints").glob("step_*"))
            assert names == ["step_000002", "step_000004"], names
            made[ranks, kind] = path
        return made[ranks, kind]

    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    tmp_path: Path,
    tiny_model_dir: Path,
    straight: Straight,
    stopped: Callable[[int, str], Path],
    name: str,
    damage: str,
) -> None:
    damaged_and_resumed(tmp_path, tiny_model_dir, stopped(1, "grpo"), (name, damage), straight(1), 1, "grpo")


@pytest.mark.multi
@pytest.mark.parametrize("damage", ["middle", "cut in half", "missing"])
@pytest.mark.parametrize("name", SHARDS)
def test_a_damaged_shard_is_named_and_the_one_before_taken(
    tmp_path: Path,
    tiny_model_dir: Path,
    straight: Straight,
    stopped: Callable[[int, str], Path],
    name: str,
    damage: str,
) -> None:
    source, expected = stopped(2, "sharded"), straight(2, "sharded")
    damaged_and_resumed(tmp_path, tiny_model_dir, source, (name, damage), expected, 2, "sharded")


def damaged_and_resumed(
    folder: Path,
    model: Path,
    source: Path,
    what: tuple[str, str],
    expected: dict[str, object],
    ranks: int,
    kind: str,
) -> None:
    name, damage = what
    shutil.copytree(source / "run", folder / "run")
    DAMAGES[damage](folder / "run" / "checkpoints" / "step_000004" / name)
    said = resumed(folder, settings_of(folder, model, kind), ranks, expected)
    assert f"step_000004/{name}: " in said and "passed over for the one before" in said, said
    assert "after step 2 of 5" in said


@pytest.mark.multi
@pytest.mark.parametrize(("where", "call", "phase"), STUCK)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stuck_is_named_with_what_it_does(
    tmp_path: Path, tiny_model_dir: Path, where: str, call: int, phase: str, rank: int
) -> None:
    """The stuck rank still gives signs of life, so the other rank waits for it until the timeout."""
    settings = settings_of(tmp_path, tiny_model_dir, distributed={"timeout": 30})
    fault = Fault(where, call, action="stall", rank=rank)
    both = launch(settings, tmp_path / "log", ranks=2, fault=fault)
    assert both[1 - rank].code == 3, both[1 - rank].said
    assert f"rank {rank} has been in {phase}" in both[1 - rank].said, both[1 - rank].said
    # the stuck rank is ended too, by its own watchdog
    assert both[rank].code == 3, both[rank].said


@pytest.mark.multi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_rank_is_named(tmp_path: Path, tiny_model_dir: Path, rank: int) -> None:
    settings = settings_of(tmp_path, tiny_model_dir, distributed={"timeout": 30})
    fault = Fault("rlhf.rollout.native.engine:NativeEngine._decode", 30, action="freeze", rank=rank)
    other = launch(settings, tmp_path / "log", ranks=2, fault=fault)[1 - rank]
    assert other.code == 3, other.said
    # rank 0 holds the store through which the ranks communicate
    named = "rank 1 has given no sign of life" if rank == 1 else "(rank 0, or its launcher) has not answered"
    assert named in other.said, other.said
