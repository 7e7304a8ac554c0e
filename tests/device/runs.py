"""By itself, since the device is for a whole process: `python -m tests.device.runs FOLDER MODEL` says as JSON
what became of everything that is tried there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.learner import LearnerConfig
from rlhf.kernels import backend
from rlhf.learn.optimizer import MasterAdamW
from rlhf.rollout.engine import SyncError
from rlhf.rollout.weight_proof import Sent, digest, prove
from tests.device.pretend import install
from tests.support import bandit_settings, metrics_of, train

FLOAT32: dict[str, Any] = {
    "steps": 2,
    "algorithm": {"name": "grpo", "kl": {"coef": 0.01}},
    "rollout": {"temperature": 1.2, "top_k": 30, "top_p": 0.95},
    "learner": {"minibatches": 2},
}
BFLOAT16: dict[str, Any] = {
    "steps": 2,
    "model": {"dtype": "bfloat16", "gradient_checkpointing": True},
    "algorithm": {"name": "ppo", "kl": {"coef": 0.01, "estimator": "exact", "placement": "loss"}},
    "critic": {"trunk": "policy", "lr": 1e-3},
}


def refused(action: Callable[[], object]) -> str:
    try:
        action()
    except (RuntimeError, TypeError) as error:
        return str(error)
    return ""


def refusals() -> dict[str, str]:
    there, here = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    return {
        "sum": refused(lambda: there + here),
        "product": refused(lambda: there @ here),
        "joined": refused(lambda: torch.cat([there, here])),
        "chosen": refused(lambda: there.index_select(0, torch.tensor([0]))),
        "numpy": refused(there.numpy),
        "number": refused(lambda: there * torch.tensor(2.0)),
        "indexed": refused(lambda: there[torch.tensor([1])]),
    }


def trained(folder: Path, model: Path, changes: dict[str, Any], *, more: int) -> list[dict[str, Any]]:
    """A run, and `more` steps after resuming it."""
    folder.mkdir()
    settings = bandit_settings(folder, model, **changes)
    for steps in (settings["steps"], settings["steps"] + more)[: 1 + bool(more)]:
        train(settings | {"steps": steps, "checkpoint": {"resume": "auto", "export": False}})
    return metrics_of(folder)


class Elsewhere:
    """Holds other numbers than it was sent, and says so over a wire."""

    def digests(self, names: Any, version: int) -> dict[str, dict[str, str]]:
        return {name: {"the parameter": digest(torch.zeros(2))} for name in names}

    def part(self, name: str, copy: str, version: int) -> Tensor:
        return torch.zeros(2)


def difference() -> str:
    sent = torch.ones(2, device="cuda")
    try:
        prove("engine", Elsewhere(), Sent({"w": digest(sent)}, lambda name: sent), 3, torch.bfloat16)
    except SyncError as error:
        return str(error)
    return ""


def room_for_a_checkpoint() -> float:
    """On the device, in the largest of 16 equal weights in float32."""
    model = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(16)).cuda()
    optimizer = MasterAdamW(model, torch.bfloat16, LearnerConfig.model_validate({}), 1)
    peak = torch.ops.pretend.peak
    peak()
    before = peak()
    held = optimizer.tensors()
    assert {t.device.type for t in held["model"].values()} == {"cpu"}
    return float(peak() - before) / (4 * 256 * 256)


def main(folder: Path, model: Path) -> None:
    install(folder)
    # its kernels are for a real one
    backend.why_not_triton = lambda tensor: "needs a GPU"
    found = {
        "refusals": refusals(),
        "float32": trained(folder / "float32", model, FLOAT32, more=0),
        "bfloat16": trained(folder / "bfloat16", model, BFLOAT16, more=1),
        "difference": difference(),
        "room": room_for_a_checkpoint(),
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
