"""A LoRA adapter sent to vLLM unmerged: less to send, the same log-probs, and old adapters are found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.learner import LearnerConfig
from rlhf.config.model import LoraConfig
from rlhf.config.rollout import RolloutConfig
from rlhf.learn.optimizer import MasterAdamW
from rlhf.models.policy import Policy
from rlhf.rollout.engine import SyncError
from rlhf.rollout.factory import make_engine
from rlhf.rollout.vllm.worker import HeldWeights
from rlhf.sync.weight_sync import WeightSync
from rlhf.types import Prompt
from tests.rollout.models import EOS, tiny
from tests.rollout.vllm.support import needs_vllm
from tests.support import ALONE, policy_of

pytestmark = needs_vllm
pytest.importorskip("peft")
SECTION = RolloutConfig.model_validate({"engine": "vllm", "vllm": {"lora": "adapter"}})
LORA = LoraConfig(rank=4, alpha=12.0)
# 7 linear layers in each of 2, two factors each
FACTORS = 28


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder: Path = tmp_path_factory.mktemp("model")
    shape: dict[str, Any] = {"head_dim": 32, "hidden_size": 128, "tie_word_embeddings": True}
    tiny("llama", initializer_range=0.02, **shape).save_pretrained(folder)
    policy = policy_of(folder)
    policy.add_adapter(LORA, seed=0)
    return policy


@pytest.fixture(scope="module")
def optimizer(policy: Policy) -> MasterAdamW:
    """Made before the engine, since it makes the policy compute in bfloat16."""
    section = LearnerConfig.model_validate({"lr": 1e-6})
    return MasterAdamW(policy.model, torch.bfloat16, section, total_steps=100)


@pytest.fixture(scope="module")
def engine(policy: Policy, optimizer: MasterAdamW) -> Iterator[Any]:
    policy.merge()
    engine: Any = make_engine(
        "vllm",
        policy.rollout_model,
        eos_token_ids=[EOS],
        kv_cache_gib=0.25,
        max_tokens=128,
        vllm=SECTION.vllm,
        lora_rank=LORA.rank,
    )
    yield engine
    engine.close()


@pytest.fixture
def sync(policy: Policy) -> WeightSync:
    prompt = Prompt("p", tuple(3 + i % 90 for i in range(70)), "")
    return WeightSync(policy, prompt, SECTION, tolerance=0.1)


def update(optimizer: MasterAdamW, size: float = 1.0) -> None:
    """A first step of Adam, in which every trained weight moves by 1e-6."""
    generator = torch.Generator().manual_seed(0)
    for master in optimizer.masters.values():
        master.gradient = size * torch.randn(master.shape, generator=generator)
    optimizer.step(0, ALONE)


def test_after_the_first_time_the_adapter_alone_is_sent(
    engine: Any, sync: WeightSync, policy: Policy, optimizer: MasterAdamW
) -> None:
    assert policy.adapter is not None
    base = sum(w.nbytes for _, w in policy.adapter.base_weights())
    factors = sum(w.nbytes for _, w in policy.adapter.factors())
    sent: list[int] = []
    for version in range(3):
        report = sync.push(engine, version)
        assert report.unread == ()
        # 20 weights, and the head, which is the embedding
        assert report.compared == 21 + FACTORS
        sent.append(report.bytes)
        update(optimizer)
    assert sent == [base + factors, factors, factors]


def test_a_large_adapter_is_sampled_from_as_the_learner_computes_it(
    engine: Any, sync: WeightSync, policy: Policy
) -> None:
    weights = {n: w for n, w in policy.model.named_parameters() if "lora_B" in n}
    before = [w.detach().clone() for w in weights.values()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    sync.push(engine, 3)
    assert sync.probe(engine).difference < 0.05
    with torch.no_grad():
        for weight, old in zip(weights.values(), before, strict=True):
            weight.copy_(old)
    # the engine still has the large one
    assert sync.probe(engine).difference > 0.1
    sync.push(engine, 4)


def test_an_old_adapter_is_named_within_one_step(
    engine: Any, sync: WeightSync, optimizer: MasterAdamW, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync.push(engine, 5)
    update(optimizer)
    with monkeypatch.context() as patched:
        patched.setattr(HeldWeights, "tandem_adapter", lambda self, path: [0])
        with pytest.raises(SyncError, match=r"hold model.layers.0.\S+.lora_A.weight .* differ, by"):
            sync.push(engine, 6)
    sync.push(engine, 7)


def test_a_base_that_changed_is_named(engine: Any, sync: WeightSync, policy: Policy) -> None:
    assert policy.adapter is not None
    sync.push(engine, 8)
    name, weight = next((n, w) for n, w in policy.adapter.base_weights() if n.endswith("down_proj.weight"))
    old = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
        with pytest.raises(SyncError, match=f"does not hold {name}"):
            sync.push(engine, 9)
        weight.copy_(old)
    sync.push(engine, 10)
