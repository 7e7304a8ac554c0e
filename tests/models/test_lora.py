"""LoRA: an adapter learns, the model under it is the reference, the engine samples from both merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.algos.algorithm import KL
from rlhf.algos.table import ALGORITHMS
from rlhf.config.load import make_config
from rlhf.config.model import LoraConfig
from rlhf.config.section import ConfigError
from rlhf.models.lora import Adapter
from rlhf.models.packing import Packed, pack
from rlhf.models.policy import Policy, WithoutAdapter
from rlhf.models.pretrained import ModelError
from rlhf.preflight.load import load_inputs
from tests.support import bandit_settings, learner_of, make_exact, metrics_of, policy_of, random_groups, train

pytest.importorskip("peft")
Folder = Callable[[str], Path]


def adapted(folder: Path, *, dtype: torch.dtype = torch.float64, packing: str = "auto") -> Policy:
    """A policy with an adapter that changes its outputs: B is not 0."""
    policy = policy_of(folder, packing=packing)
    policy.add_adapter(LoraConfig(rank=4, alpha=8.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    if dtype == torch.float64:
        make_exact(policy.model)
    return policy


def ragged() -> Packed:
    groups = random_groups(5, sizes=[3, 1, 4])
    return pack(
        [torch.tensor(g.prompt.token_ids) for g in groups],
        [[torch.tensor(t.token_ids) for t in g.trajectories] for g in groups],
    )


def logprobs(policy: Policy) -> Tensor:
    got = policy.statistics(ragged(), temperature=1.0, want=("logprob",)).logprob
    assert got is not None
    return got


def test_a_new_adapter_changes_nothing_and_is_all_that_learns(tiny_model_dir: Path):
    plain, policy = policy_of(tiny_model_dir), policy_of(tiny_model_dir)
    policy.add_adapter(LoraConfig(rank=4), seed=0)
    assert torch.equal(logprobs(policy), logprobs(plain))
    learner, _ = learner_of(policy, ALGORITHMS["grpo"](kl=KL()))
    names = list(learner.optimizer.masters)
    assert len(names) == 2 * 2 * 7 and all("lora_" in name for name in names)
    # q and o 32 -> 32, k and v 32 -> 16, gate and up 32 -> 64, down 64 -> 32; two layers, rank 4
    learning = sum(master.weight.numel() for master in learner.optimizer.masters.values())
    assert learning == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)


def test_the_same_seed_gives_the_same_adapter_whatever_was_drawn_before(tiny_model_dir: Path):
    def first(seed: int) -> Tensor:
        torch.rand(1)
        policy = policy_of(tiny_model_dir)
        policy.add_adapter(LoraConfig(), seed=seed)
        return next(w for n, w in policy.model.named_parameters() if "lora_A" in n)

    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(1))


@pytest.mark.parametrize("shape", ["llama", "gemma"])
def test_switched_off_it_is_the_model_loaded_anew(tiny_model: Folder, shape: str):
    policy, plain = adapted(tiny_model(shape)), policy_of(tiny_model(shape), dtype=torch.float64)
    reference = WithoutAdapter(policy)
    before = logprobs(policy)
    assert torch.equal(logprobs(reference), logprobs(plain))
    assert not torch.allclose(before, logprobs(plain), atol=1e-3)
    assert torch.equal(logprobs(policy), before)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_gradients_against_the_adapter_switched_off_are_those_against_a_second_model(
    tiny_model_dir: Path, estimator: Any, checkpointing: bool
):
    algorithm = ALGORITHMS["grpo"](kl=KL(coef=0.1, estimator=estimator))
    results: list[list[Tensor]] = []
    for packing, second in (("auto", False), ("padded", True)):
        policy = adapted(tiny_model_dir, packing=packing)
        reference = policy_of(tiny_model_dir, dtype=torch.float64) if second else WithoutAdapter(policy)
        if checkpointing:
            policy.checkpoint_activations()
        learner, builder = learner_of(policy, algorithm, reference, microbatch_tokens=60)
        experience = builder.build(random_groups(3, sizes=[3, 2, 4]), kl_coef=0.1)
        groups = [0, 1, 2]
        learner.accumulate(experience, groups, learner.counts(experience, groups), 0.1)
        learning = [master.weight for master in learner.optimizer.masters.values()]
        assert all(w.grad is not None for w in learning)
        results.append([w.grad for w in learning if w.grad is not None])
        frozen = [p for p in policy.model.parameters() if not p.requires_grad]
        assert frozen and all(p.grad is None for p in frozen)
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-9 * want.abs().max()


@pytest.mark.parametrize("shape", ["llama", "qwen2", "gemma"])
def test_the_merged_model_is_the_adapted_one_and_shares_what_has_no_adapter(tiny_model: Folder, shape: str):
    policy = adapted(tiny_model(shape), dtype=torch.float32)
    policy.merge()
    torch.testing.assert_close(
        logprobs(Policy(policy.rollout_model, layout="shared_prefix")), logprobs(policy), rtol=1e-5, atol=2e-5
    )
    own = {name.replace(".base_layer", ""): p for name, p in policy.model.named_parameters()}
    for name, parameter in policy.rollout_model.named_parameters():
        assert (parameter is own[name]) == (not name.endswith("proj.weight")), name


def test_merging_again_writes_to_the_same_tensors(tiny_model_dir: Path):
    policy = adapted(tiny_model_dir, dtype=torch.float32)
    policy.merge()
    weights = dict(policy.rollout_model.named_parameters())
    before = {name: (w.data_ptr(), w._version) for name, w in weights.items()}
    policy.merge()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert policy.rollout_model.get_parameter(name) is weights[name]
    # engines that keep a packed weight notice a change by its version
    assert weights[name].data_ptr() == before[name][0] and weights[name]._version > before[name][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ["q_prj"]}, "did you mean q_proj"),
        ({"targets": ["lm_head"]}, "below its head"),
        ({"targets": ["embed_tokens"]}, "no linear layer"),
    ],
)
def test_targets_that_are_no_linear_layer_are_refused(
    tiny_model_dir: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(ModelError, match=message):
        policy_of(tiny_model_dir).add_adapter(LoraConfig.model_validate(changes), seed=0)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"load_in_4bit": True}, "load_in_4bit: QLoRA is not supported"),
        ({"dropout": 0.1}, "model.lora.dropout: must be 0"),
        ({"rnk": 3}, "did you mean model.lora.rank"),
        ({"rank": 0}, "model.lora.rank"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, tiny_model_dir: Path, lora: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        make_config(bandit_settings(tmp_path, tiny_model_dir, model={"lora": lora}))


def test_quantized_weights_are_refused_before_they_are_loaded(tmp_path: Path, tiny_model: Folder):
    folder = tmp_path / "quantized"
    shutil.copytree(tiny_model("llama"), folder)
    settings = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": quantization}))
    with pytest.raises(ConfigError, match=r"quantized \(bitsandbytes\): QLoRA is not supported"):
        load_inputs(make_config(bandit_settings(tmp_path, folder, model={"lora": {}})))


LORA = {"model": {"lora": {"rank": 8, "alpha": 32.0}}, "learner": {"lr": 3e-2}}


def test_a_run_learns_saves_its_adapter_alone_and_exports_it_both_ways(tmp_path: Path, tiny_model: Folder):
    import peft

    kl = {"coef": 0.01, "estimator": "exact"}
    settings = bandit_settings(
        tmp_path, tiny_model("llama-sharp"), **LORA, algorithm={"kl": kl}, checkpoint={"export": True}
    )
    train(settings)
    rewards = [record["reward/mean"] for record in metrics_of(tmp_path)]
    assert sum(rewards[-3:]) / 3 > 3 * max(0.01, sum(rewards[:3]) / 3), rewards
    run = tmp_path / "run"
    saved = load_file(run / "checkpoints" / "step_000012" / "policy.model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama-sharp"))
    start = base(ids).logits.log_softmax(-1)
    merged = AutoModelForCausalLM.from_pretrained(run / "model")(ids).logits.log_softmax(-1)
    adapter = peft.PeftModel.from_pretrained(base, run / "adapter")(ids).logits.log_softmax(-1)
    torch.testing.assert_close(adapter, merged, rtol=1e-5, atol=1e-5)
    assert (adapter - start).abs().max() > 0.1
    trained = {name: tensor for name, tensor in saved.items() if "lora_B" in name}
    exported = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, tensor in trained.items():
        assert torch.equal(exported[f"base_model.model.{name.replace('.default', '')}"], tensor)


def test_in_bfloat16_with_a_kl_in_the_reward_and_another_engine_it_learns_too(
    tmp_path: Path, tiny_model: Folder
):
    kl = {"coef": 0.01, "estimator": "k1", "placement": "reward"}
    algorithm, rollout = {"name": "rloo", "kl": kl}, {"engine": "hf"}
    settings = bandit_settings(
        tmp_path, tiny_model("llama-sharp"), **LORA, algorithm=algorithm, rollout=rollout
    )
    settings["model"]["dtype"] = "bfloat16"
    settings["learner"]["lr"] = 1e-2
    # a single rewarded letter of a hundred would be found by luck alone; ten of them are always found
    (tmp_path / "reward.py").write_text(
        "def share_of_a(completions, **_):\n"
        "    return [sum(c in 'abcdefghij' for c in text) / max(1, len(text)) for text in completions]\n"
    )
    train(settings)
    rewards = [record["reward/mean"] for record in metrics_of(tmp_path)]
    assert sum(rewards[-3:]) / 3 > 2 * sum(rewards[:3]) / 3 > 0, rewards


def test_a_resumed_run_has_its_adapter_bit_for_bit(tmp_path: Path, tiny_model: Folder):
    weights: list[dict[str, Tensor]] = []
    for name, stops in (("straight", (4,)), ("resumed", (2, 4))):
        (tmp_path / name).mkdir()
        for steps in stops:
            settings = bandit_settings(tmp_path / name, tiny_model("llama-sharp"), **LORA, steps=steps)
            train(settings | {"checkpoint": {"resume": "auto", "export": False}})
        file = tmp_path / name / "run" / "checkpoints" / "step_000004" / "policy.model.safetensors"
        weights.append(load_file(file))
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_an_engine_that_never_gets_the_adapter_is_noticed(
    tmp_path: Path, tiny_model: Folder, monkeypatch: pytest.MonkeyPatch
):
    from rlhf.rollout.engine import SyncError

    merge = Adapter.merge
    calls: list[int] = []

    def merge_at_the_start_only(adapter: Adapter) -> None:
        calls.append(1)
        if len(calls) <= 2:
            merge(adapter)

    monkeypatch.setattr(Adapter, "merge", merge_at_the_start_only)
    with pytest.raises(SyncError, match="differ"):
        train(bandit_settings(tmp_path, tiny_model("llama-sharp"), **LORA))
