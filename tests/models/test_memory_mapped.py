"""Memory-mapped weights are the same weights, and take no memory between two passes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhf.models.memory_mapped import MemoryMappedWeights
from rlhf.models.packing import pack
from rlhf.models.policy import Policy
from rlhf.models.pretrained import load_model
from tests.support import policy_of

CPU = torch.device("cpu")


def resident_kib(file: Path) -> int:
    """Resident memory of all mappings of a file in this process, in KiB."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def logprobs(policy: Policy) -> torch.Tensor:
    ids = torch.arange(3, 40)
    with torch.no_grad():
        found = policy.statistics(
            pack([ids[:9]], [[ids[9:20], ids[20:]]]), temperature=1.0, want=("logprob",)
        )
    assert found.logprob is not None
    return found.logprob


@pytest.mark.parametrize("shape", ["llama", "llama-tied", "qwen3"])
def test_a_mapped_model_is_the_same_and_releases_its_pages(
    tiny_model: Callable[[str], Path], tmp_path: Path, shape: str
) -> None:
    # a copy of the file, which nothing else in this process has mapped
    folder = shutil.copytree(tiny_model(shape), tmp_path / "model")
    policy = policy_of(folder)
    want = logprobs(policy)
    policy.freeze(torch.float32)
    policy.leave_in_file(str(folder))
    file = folder / "model.safetensors"
    assert resident_kib(file) == 0
    seen: list[int] = []
    layer = policy.model.get_submodule("model.layers.1")
    layer.register_forward_pre_hook(lambda *_: seen.append(resident_kib(file)))
    layer.get_submodule("mlp").register_forward_hook(lambda *_: seen.append(resident_kib(file)))
    got = logprobs(policy)
    assert torch.equal(got, want)
    before, within = seen
    assert resident_kib(file) == before == 0 and within > 0
    assert policy.head.module.weight.sum().isfinite() and resident_kib(file) > 0


def test_a_weight_that_is_another_in_the_file_stays_in_memory(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    model = load_model(str(folder), CPU)
    one = dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    with torch.no_grad():
        one[3, 4] += 1
    changed = one.detach().clone()
    whole = sum(p.nbytes for p in model.parameters())
    assert MemoryMappedWeights(model, folder).bytes == whole - one.nbytes
    assert torch.equal(one, changed)
    nn.Module.to(model, torch.bfloat16)
    assert MemoryMappedWeights(model, folder).bytes == 0, "of another type"


def test_a_file_that_is_written_to_meanwhile_is_noticed(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    mapped = MemoryMappedWeights(load_model(str(folder), CPU), folder)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(RuntimeError, match="was written to while the reference is read from it"):
        mapped.release_pages()
