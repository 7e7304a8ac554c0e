"""Weights of a sharded model are sent and written layer by layer: no rank ever holds them all."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf.config.learner import DistributedConfig
from rlhf.config.model import ModelConfig
from rlhf.config.rollout import RolloutConfig
from rlhf.distributed.world import World, world
from rlhf.models.loading import load_sharded_policy
from rlhf.models.policy import Policy
from rlhf.models.sharding import Sharding, as_whole, gathered, open_policy
from rlhf.rollout.weight_file import WeightFile
from rlhf.rollout.weight_proof import Aliases
from rlhf.sync.weight_sync import WeightSync
from rlhf.types import Prompt
from tests.ranks import together

LAYERS, SMALL = 8, 2048
"""Layers of the model; tensors below so many bytes (norms) are not counted."""


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors of this process after each torch call, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, StorageWeakRef] = {}
        for thing in gc.get_objects():
            # not isinstance: proxies of libraries answer that by importing things
            if issubclass(type(thing), torch.Tensor):
                self._add(thing)
        self.before = self.peak = self.now()

    def _add(self, tensor: torch.Tensor) -> None:
        # by its size when gathered: the memory of a sharded weight is empty until then
        large = tensor.numel() * tensor.element_size() >= SMALL
        if large and type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
            reference = StorageWeakRef(tensor.untyped_storage())
            self._storages.setdefault(reference.cdata, reference)

    def now(self) -> int:
        self._storages = {key: ref for key, ref in self._storages.items() if not ref.expired()}
        storages = [torch.UntypedStorage._new_with_weak_ptr(key) for key in self._storages]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    @property
    def extra(self) -> int:
        return self.peak - self.before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if not function.is_view:
            for tensor in tree_leaves(found):
                if isinstance(tensor, torch.Tensor):
                    self._add(tensor)
            self.peak = max(self.peak, self.now())
        return found


def sharded(folder: str, here: World) -> Policy:
    sharding = Sharding.of(DistributedConfig(mode="sharded"), torch.float32, here)
    assert sharding is not None
    return load_sharded_policy(ModelConfig(path=folder), folder, sharding, trains=True)


def opened_in_parts(folder: str) -> None:
    with world() as here:
        sharding = Sharding.of(DistributedConfig(mode="sharded"), torch.float32, here)
        assert sharding is not None
        gc.collect()
        with Alive() as alive:
            model = open_policy(folder, sharding, trains=True)
        whole = 4 * sum(p.numel() for p in model.parameters())
        assert 0.4 * whole < alive.extra < 0.65 * whole, (alive.extra, whole)


def sent_in_parts(folder: str) -> None:
    with world() as here:
        policy = sharded(folder, here)
        sync = WeightSync(policy, Prompt("p", (3, 4), "p"), RolloutConfig(), tolerance=1e-3)
        whole = 4 * sum(p.numel() for p in policy.model.parameters())
        path = Path(folder) / "sent.safetensors"
        gc.collect()
        with Alive() as alive:
            if here.is_main:
                with WeightFile(path, Aliases(sync).all) as file:
                    for name, weight in sync.named_tensors():
                        file.add(name, weight)
                assert file.bytes == whole
            else:
                for _ in sync.named_tensors():
                    pass
        # one layer of eight, as it was gathered and cut into its weights
        assert 0 < alive.extra < 0.35 * whole, (alive.extra, whole)
        with Alive() as alive:
            held = [weight.clone() for _, weight in gathered(policy.model)]
        assert alive.extra >= whole and held, "the count sees who holds all weights"


def exported_in_parts(folder: str) -> None:
    with world() as here:
        model = sharded(folder, here).model
        target = Path(folder) / "exported"
        if here.is_main:
            target.mkdir()
            as_whole(model).save_pretrained(str(target))
        else:
            for _ in gathered(model):
                pass


@pytest.fixture
def deep_model(tmp_path: Path) -> Path:
    """A model of which one layer, and the weights outside of layers, are a small part."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.multi
def test_a_sharded_model_is_opened_without_a_rank_that_holds_more_than_its_part(deep_model: Path) -> None:
    together(2, opened_in_parts, str(deep_model))


@pytest.mark.multi
def test_a_rank_that_sends_its_shards_holds_one_layer_more_and_sends_the_right_weights(
    deep_model: Path,
) -> None:
    together(2, sent_in_parts, str(deep_model))
    sent, own = load_file(deep_model / "sent.safetensors"), load_file(deep_model / "model.safetensors")
    assert sent.keys() == own.keys()
    assert all(torch.equal(sent[name], own[name]) for name in own)


@pytest.mark.multi
def test_a_model_in_shards_is_exported_as_any_other(deep_model: Path) -> None:
    together(2, exported_in_parts, str(deep_model))
    kind: Any = AutoModelForCausalLM
    exported, own = (kind.from_pretrained(path) for path in (deep_model / "exported", deep_model))
    assert exported.config.architectures == own.config.architectures == ["LlamaForCausalLM"]
    assert exported.dtype == torch.float32
    for name, weight in own.state_dict().items():
        assert torch.equal(exported.state_dict()[name], weight), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_written_tensor_by_tensor_is_a_safetensors_file(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {"a": torch.randn(3, 5).to(dtype), "b.c": torch.randn(7).to(dtype), "ü": torch.tensor(2.0)}
    weights["turned"] = torch.randn(4, 2).to(dtype).t()
    with WeightFile(tmp_path / "w.safetensors", [*weights, "never sent"]) as file:
        for name, weight in weights.items():
            file.add(name, weight)
    read = load_file(tmp_path / "w.safetensors")
    assert read.keys() == weights.keys() and file.bytes == sum(w.nbytes for w in weights.values())
    assert all(
        torch.equal(read[name], weight) and read[name].dtype == weight.dtype
        for name, weight in weights.items()
    )


def test_a_file_whose_writing_failed_cannot_be_loaded(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="weight 'a' is sent twice"),
        WeightFile(tmp_path / "w", ["a"]) as file,
    ):
        file.add("a", torch.zeros(2))
        file.add("a", torch.zeros(2))
    with pytest.raises(Exception, match=r"[Hh]eader"):
        load_file(tmp_path / "w")
