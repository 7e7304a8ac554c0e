"""The kill points of a run: for each phase, the calls at which its process is killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.checkpoints.store import latest
from tests.faults.processes import EVERY, Fault, assert_same, launch, logged_steps, result, settings_of

Straight = Callable[..., dict[str, Any]]
NOTICED: list[float] = []
"""Seconds from the kill of one rank until another rank had ended, for all kills on several ranks."""

ALONE: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "load": [("rlhf.components:load_policy", (0, 1)), ("rlhf.learn.optimizer:MasterAdamW.__init__", (0,))],
    "sync": [
        ("rlhf.sync.weight_sync:WeightSync.push", (0, 2, 4)),
        ("rlhf.sync.weight_sync:WeightSync.probe", (3,)),
    ],
    "eval": [("rlhf.trainer:evaluate", (0, 1))],
    "rollout": [
        ("rlhf.rollout.native.engine:NativeEngine._decode", (0, 40, 80)),
        ("rlhf.rollout.native.engine:NativeEngine._prefill", (4, 7)),
    ],
    "reward": [("rlhf.rewards.scoring:Rewards.gather", (0, 2, 4))],
    "experience": [("rlhf.learn.experience:ExperienceBuilder.build", (0, 3))],
    "backward": [("torch.autograd:backward", (0, 3, 6, 9))],
    "optimizer": [
        ("rlhf.learn.optimizer:MasterAdamW.apply", (0, 1, 7)),
        # the model has about 20 weights, so these are in the middle of an update
        ("rlhf.learn.master_weights:Master.update", (50, 75, 115)),
    ],
    "metrics": [
        ("rlhf.monitoring.monitor:Stream.append", (0, 3, 8)),
        ("rlhf.monitoring.monitor:Monitor.evaluated", (0, 1)),
    ],
    "save": [
        ("rlhf.checkpoints.store:save_file", (0, 1, 2, 3)),
        ("rlhf.checkpoints.store:write_atomically", (0, 1, 2, 5)),
        ("rlhf.checkpoints.store:prune", (0, 2)),
    ],
    "rename": [("os:rename", (0, 1, 2)), ("os:replace", (5, 7)), ("os:fsync", (6, 14))],
    "finish": [("rlhf.trainer:write_report", (0,))],
}
TOGETHER: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "load": [("rlhf.components:load_policy", (0,))],
    "rollout": [("rlhf.rollout.native.engine:NativeEngine._decode", (30,))],
    "reward": [("rlhf.rewards.scoring:Rewards.gather", (3,))],
    "backward": [("torch.autograd:backward", (3,))],
    "optimizer": [("rlhf.learn.master_weights:Master.update", (90,))],
    "collective": [
        ("torch.distributed:all_reduce", (2, 9)),
        ("torch.distributed:all_gather_object", (1, 14)),
    ],
    "sync": [("rlhf.sync.weight_sync:WeightSync.push", (4,))],
}
STUCK = [
    ("rlhf.collect.sampler:generate", 2, "rollout"),
    ("rlhf.rewards.scoring:Rewards.gather", 2, "reward"),
    ("torch.autograd:backward", 3, "learn"),
]
"""Calls in which a rank gets stuck, and the phase that the other rank names."""
SAVING = [
    Fault("rlhf.checkpoints.store:save_file", 1),
    Fault("os:rename", 1),
    Fault("os:rename", 0, after=True),
]


PPO_MAX = [
    Fault("rlhf.rollout.native.engine:NativeEngine._decode", 40),
    Fault("rlhf.learn.experience:ExperienceBuilder.build", 3),
    Fault("torch.autograd:backward", 5),
    # policy and critic have an optimizer each: the kill is between their steps
    Fault("rlhf.learn.optimizer:MasterAdamW.apply", 4, after=True),
    Fault("rlhf.learn.optimizer:MasterAdamW.apply", 5, after=True),
    Fault("rlhf.checkpoints.store:save_file", 3),
    Fault("os:rename", 1),
    Fault("rlhf.sync.weight_sync:WeightSync.push", 4),
]
SHARDED = [
    Fault("rlhf.models.sharding:_fill", 1),
    Fault("rlhf.rollout.native.engine:NativeEngine._decode", 40),
    Fault("torch.autograd:backward", 5),
    Fault("rlhf.learn.master_weights:Master.update", 90),
    Fault("rlhf.checkpoints.store:save_file", 3),
    Fault("rlhf.checkpoints.saver:write_atomically", 1, rank=1),
    Fault("os:rename", 1),
    Fault("rlhf.models.policy:Policy.merge", 3),
]


def alone() -> list[Fault]:
    """Kill points on one rank: before the calls, and after some of them have returned."""
    before = [Fault(where, call) for points in ALONE.values() for where, calls in points for call in calls]
    behind = [
        Fault(where, 1, after=True)
        for where in (
            "rlhf.learn.master_weights:Master.update",
            "rlhf.checkpoints.store:save_file",
            "os:rename",
            "os:replace",
            "rlhf.sync.weight_sync:WeightSync.push",
        )
    ]
    return before + behind


def together() -> list[Fault]:
    """Kill points on two ranks: each rank is killed in turn; only rank 0 saves."""
    points = [(where, call) for points in TOGETHER.values() for where, calls in points for call in calls]
    return [Fault(where, call, rank=rank) for rank in (0, 1) for where, call in points] + SAVING


def killed_and_resumed(
    folder: Path, model: Path, fault: Fault, ranks: int, straight: Straight, kind: str = "grpo"
) -> None:
    """Kills and resumes a run: the result is that of an undisturbed run, and no saved step is repeated."""
    settings = settings_of(folder, model, kind)
    killed = launch(settings, folder / "killed", ranks=ranks, fault=fault)
    assert killed[fault.rank].code == -9, f"it was not killed: {killed[fault.rank].said}"
    for rank, other in enumerate(killed):
        if rank != fault.rank:
            assert other.code not in (0, -9) and f"rank {fault.rank}" in other.said, other.said
            NOTICED.append(other.at - killed[fault.rank].at)
    done = logged_steps(folder)
    newest = latest(folder / "run" / "checkpoints")
    saved = 0 if newest is None else int(newest.name.removeprefix("step_"))
    assert saved >= done - EVERY, f"{done} steps were done, the last checkpoint has {saved}"
    resumed(folder, settings, ranks, straight(ranks, kind))


def resumed(folder: Path, settings: dict[str, Any], ranks: int, expected: dict[str, Any]) -> str:
    """Resumes a disturbed run, compares its result with the expected one, and returns its output."""
    ended = launch(settings, folder / "resumed", ranks=ranks)
    for rank in ended:
        assert rank.code == 0, rank.said
    assert_same(result(folder), expected)
    return ended[0].said
