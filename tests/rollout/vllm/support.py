"""Helpers of the vLLM tests, which are skipped without vLLM; with TANDEM_TEST_VLLM=1 it must be there."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.rollout.models import EOS, VOCABULARY

# seconds; generous, since the machine may be busy
PATIENCE = 300.0
INSTALLED = find_spec("vllm") is not None
if os.environ.get("TANDEM_TEST_VLLM") == "1" and not INSTALLED:
    raise RuntimeError("TANDEM_TEST_VLLM=1, but vllm is not installed: make setup EXTRAS=vllm")
needs_vllm = pytest.mark.skipif(not INSTALLED, reason="vllm is not installed: make setup EXTRAS=vllm")


def sampled_model(model: PreTrainedModel, folders: pytest.TempPathFactory, *, kv_cache_gib: float) -> Any:
    """Saves `model` and returns its `VLLMModel`."""
    from rlhf.rollout.vllm.in_process import VLLMModel

    folder = folders.mktemp("model")
    model.save_pretrained(folder)
    return VLLMModel(str(folder), torch.float32, 512, VOCABULARY, (EOS,), kv_cache_gib=kv_cache_gib)


def wait_for(condition: Any) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


def server_of(replica: Any) -> int:
    """Process id of the replica's server, the child of its keeper."""
    children = Path(f"/proc/{replica._keeper.pid}/task/{replica._keeper.pid}/children").read_text().split()
    return int(children[0])


def processes_of(group: int) -> list[int]:
    """Ids of the running processes of a process group."""
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
