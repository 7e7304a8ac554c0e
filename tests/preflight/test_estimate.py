"""The estimates of `rlhf check` agree with what is then allocated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf.config.load import make_config
from rlhf.learn.optimizer import MasterAdamW
from rlhf.models.layers.recompute import recomputing
from rlhf.models.packing import pack
from rlhf.models.pretrained import load_model
from rlhf.models.sizes import kept_in_a_pass, model_sizes
from rlhf.preflight.estimate import GIB, Estimate, estimate
from rlhf.preflight.load import load_inputs
from rlhf.preflight.machine import Machine
from tests.rewards.test_model import save_classifier
from tests.support import bandit_settings, bytes_held, policy_of

LARGE = Machine("CPU", 8 * GIB, flops=1e11, bandwidth=1e10)


def estimated(
    folder: Path, model_dir: Path, *, ranks: int = 1, machine: Machine = LARGE, **changes: Any
) -> Estimate:
    config = make_config(bandit_settings(folder, model_dir, **changes))
    return estimate(config, load_inputs(config, world_size=ranks), world_size=ranks, machine=machine)


def bytes_of(found: Estimate, name: str) -> int:
    (item,) = [item for item in found.memory if name in item.name]
    return item.bytes


def test_a_model_is_counted_without_its_weights(tiny_model: Callable[[str], Path]):
    sizes = model_sizes(str(tiny_model("qwen2")), torch.bfloat16)
    # queries, keys, values and output 32 x (32 + 16 + 16 + 32), and three matrices of 32 x 64
    layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64
    assert sizes.matrices == 2 * layer and sizes.head == 99 * 32
    assert sizes.weights == sum(
        p.numel() for p in load_model(str(tiny_model("qwen2")), torch.device("cpu")).parameters()
    )
    assert sizes.weights == 2 * sizes.largest_layer + sizes.outside_layers
    assert sizes.key_value_bytes == 2 * 2 * 2 * 8 * 2


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activations_that_a_layer_keeps_are_counted_exactly(
    tiny_model: Callable[[str], Path], shape: str, dtype: torch.dtype
):
    policy = policy_of(tiny_model(shape), packing="packed")
    nn.Module.to(policy.model, dtype)
    ids = torch.arange(3, 67)
    packed = pack([ids[:1]], [[ids[1:]]])
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden: Any = policy.hidden
    with recomputing(keep):
        hidden.__wrapped__(policy, packed)
    ours = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    real = sum(size for place, size in kept.items() if place not in ours) / len(ids)
    sizes = model_sizes(str(tiny_model(shape)), dtype)
    assert sizes.kept_bytes is not None
    assert sizes.kept_bytes == pytest.approx(real, rel=0.05)


def test_it_grows_with_the_tokens_alone(tiny_model_dir: Path):
    from rlhf.models.pretrained import empty_model

    model = empty_model(str(tiny_model_dir), torch.bfloat16, head=False)
    nn.Module.to(model, "meta")
    assert kept_in_a_pass(model, 64) == 4 * kept_in_a_pass(model, 16)


def test_weights_and_optimizer_take_what_they_are_said_to(tmp_path: Path, tiny_model_dir: Path):
    found = estimated(tmp_path, tiny_model_dir, model={"dtype": "bfloat16"})
    config = make_config(bandit_settings(tmp_path, tiny_model_dir))
    model = load_model(str(tiny_model_dir), torch.device("cpu"))
    optimizer = MasterAdamW(model, torch.bfloat16, config.learner, 1)
    gradients, held = 0, 0
    for master in optimizer.masters.values():
        master.collect()
        gradients += master.widened().nbytes
    optimizer.apply(0, torch.tensor(0.0))
    for master in optimizer.masters.values():
        assert master.weight.dtype == torch.bfloat16
        held += bytes_held(master) + master.moments.first.nbytes + master.moments.second.nbytes
    assert bytes_of(found, "policy: gradients") == gradients
    assert bytes_of(found, "AdamW") == held


def test_four_ranks_share_the_learner_and_each_holds_a_copy_that_samples(
    tmp_path: Path, tiny_model_dir: Path
):
    one = estimated(tmp_path, tiny_model_dir)
    four = estimated(tmp_path, tiny_model_dir, ranks=4, distributed={"mode": "sharded"})
    for name in ("AdamW", "policy: gradients"):
        assert bytes_of(four, name) == pytest.approx(bytes_of(one, name) / 4, rel=0.001)
    assert (
        bytes_of(four, "whole, for the engine") == 4 * model_sizes(str(tiny_model_dir), torch.float32).weights
    )
    assert one.gathered == one.summed == four.summed == 0 and four.gathered > 0
    replicated = estimated(tmp_path, tiny_model_dir, ranks=4)
    # a ring sends (n-1)/n of the float32 gradients twice
    assert replicated.summed == int(2 * 3 / 4 * bytes_of(one, "policy: gradients"))


def test_an_engine_of_its_own_memory_is_counted(tmp_path: Path, tiny_model_dir: Path):
    settings = bandit_settings(tmp_path, tiny_model_dir)
    inputs = load_inputs(make_config(settings))
    settings["rollout"] |= {"engine": "vllm", "kv_cache_gib": 0.5}
    found = estimate(make_config(settings), inputs, world_size=1, machine=LARGE)
    assert bytes_of(found, "vLLM") == GIB // 2
    assert bytes_of(found, "whole, for the engine") == bytes_of(found, "policy: gradients")


def test_ranks_that_send_their_shards_elsewhere_hold_no_whole_copy(tmp_path: Path, tiny_model_dir: Path):
    settings = bandit_settings(tmp_path, tiny_model_dir, distributed={"mode": "sharded"})
    inputs = load_inputs(make_config(settings))
    settings["rollout"] |= {"engine": "vllm-server"}
    found = estimate(make_config(settings), inputs, world_size=4, machine=LARGE)
    assert not [item.name for item in found.memory if "engine" in item.name or "keys" in item.name]


def test_an_adapter_has_an_optimizer_of_its_own_size(tmp_path: Path, tiny_model_dir: Path):
    found = estimated(tmp_path, tiny_model_dir, model={"lora": {"rank": 4}})
    # per layer: q and o 32+32, k and v 32+16, gate, up and down 32+64
    sides = 2 * (2 * 64 + 2 * 48 + 3 * 96)
    assert bytes_of(found, "adapter: gradients") == 4 * 4 * sides
    assert bytes_of(found, "merged for the engine") > 0


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (
            {"learner": {"microbatch_tokens": 1 << 20}, "rollout": {"prompts_per_step": 2000}},
            "learner.microbatch_tokens",
        ),
        (
            {"rollout": {"prompts_per_step": 8, "group_size": 64}, "learner": {"microbatch_tokens": 40}},
            "rollout.kv_cache_gib",
        ),
    ],
)
def test_what_will_not_fit_is_said_with_the_setting_to_change(
    tmp_path: Path, tiny_model_dir: Path, changes: dict[str, Any], advice: str
):
    small = Machine("CPU", 1 << 20, flops=1e11, bandwidth=1e10)
    found = estimated(tmp_path, tiny_model_dir, machine=small, **changes)
    said = "\n".join(found.lines())
    assert not found.fits and "WILL NOT FIT" in said
    assert advice in said.partition("WILL NOT FIT")[2]
    assert "WILL NOT FIT" not in "\n".join(estimated(tmp_path, tiny_model_dir).lines())


def test_twice_the_work_takes_twice_the_time(tmp_path: Path, tiny_model_dir: Path):
    one = estimated(tmp_path, tiny_model_dir)
    two = estimated(tmp_path, tiny_model_dir, rollout={"prompts_per_step": 16})
    fast = estimated(tmp_path, tiny_model_dir, machine=Machine("CPU", GIB, flops=2e11, bandwidth=2e10))
    assert two.seconds.learn == pytest.approx(2 * one.seconds.learn, rel=0.1)
    assert fast.seconds.step == pytest.approx(one.seconds.step / 2)
    assert estimated(tmp_path, tiny_model_dir, ranks=8).seconds.learn < one.seconds.learn / 4


def test_rates_are_measured():
    machine = Machine.measured(torch.device("cpu"), torch.float32, ranks_here=2)
    assert 1e8 < machine.flops < 1e14 and 1e8 < machine.bandwidth < 1e13
    assert machine.on_cpu and GIB // 4 < machine.memory < 1 << 45


def test_models_that_reward_functions_and_judges_load_are_counted(tmp_path: Path, tiny_model_dir: Path):
    scorer = save_classifier(tmp_path / "scorer", ["reward"])
    functions = [{"path": "reward_model", "params": {"model": str(scorer)}, "workers": 2, "name": "scores"}]
    rewards = {"functions": functions}
    found = estimated(tmp_path, tiny_model_dir, reward=rewards)
    trunk = 4 * model_sizes(str(scorer), torch.float32, head=False).weights
    assert bytes_of(found, f"reward function scores: {scorer} x 2 workers") == 2 * trunk
    # in the memory of a GPU there is only what is told to use it
    gpu = Machine("A GPU", 8 * GIB, flops=1e14, bandwidth=1e12)
    assert not [
        i for i in estimated(tmp_path, tiny_model_dir, machine=gpu, reward=rewards).memory if "sc" in i.name
    ]
    params = {"model": str(tiny_model_dir), "letters": ["a", "b"], "dtype": "bfloat16"}
    judge = {"path": "pair_model", "params": params}
    found = estimated(
        tmp_path,
        tiny_model_dir,
        algorithm={"name": "dpo"},
        reward={"functions": [], "preference": judge},
    )
    sizes = model_sizes(str(tiny_model_dir), torch.bfloat16)
    assert bytes_of(found, f"judge pair_model: {tiny_model_dir}") == 2 * sizes.weights
