"""Faults put into a running vLLM: each is named at the next sync, after one update at a learning rate of
1e-6.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf.rollout.vllm.in_process as vllm_engine
from rlhf.config.learner import LearnerConfig
from rlhf.config.model import LoraConfig
from rlhf.config.rollout import RolloutConfig
from rlhf.learn.optimizer import MasterAdamW
from rlhf.models.lora import Adapter
from rlhf.models.policy import Policy
from rlhf.rollout.engine import EngineError, SyncError
from rlhf.rollout.vllm.worker import HeldWeights
from rlhf.sync.weight_sync import WeightSync
from rlhf.types import Prompt
from tests.rollout.models import EOS, VOCABULARY, tiny
from tests.rollout.vllm.support import needs_vllm
from tests.support import ALONE, policy_of

pytestmark = needs_vllm
# weights of the size that models have: an update of 1e-6 rounds one in a hundred or so to its neighbour
USUAL, SHARP = 0.02, 0.3
SHAPE: dict[str, Any] = {"head_dim": 32, "hidden_size": 128, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    paths: dict[float, Path] = {}
    for spread in (USUAL, SHARP):
        paths[spread] = tmp_path_factory.mktemp("model")
        tiny("llama", initializer_range=spread, **SHAPE).save_pretrained(paths[spread])
    return paths


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, folder: Any) -> Iterator[Any]:
    """In bfloat16, unless a test says otherwise."""
    dtype = getattr(request, "param", torch.bfloat16)
    model = vllm_engine.VLLMModel(str(folder[USUAL]), dtype, 128, VOCABULARY, (EOS,), kv_cache_gib=0.25)
    engine = vllm_engine.VLLMEngine(model)
    yield engine
    engine.close()


class Run:
    """A policy with its optimizer and weight sync."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        lora: bool = False,
        stop_token_ids: tuple[int, ...] = (),
    ) -> None:
        section = LearnerConfig.model_validate({"lr": 1e-6})
        self.policy: Policy = policy_of(folder)
        if lora:
            self.policy.add_adapter(LoraConfig(), seed=0)
        self.optimizer = MasterAdamW(self.policy.model, dtype, section, total_steps=10)
        # longer than two blocks of the prefix cache
        prompt = Prompt("p", tuple(3 + i % 90 for i in range(70)), "")
        rollout = RolloutConfig(engine="vllm", stop_token_ids=stop_token_ids)
        self.sync = WeightSync(self.policy, prompt, rollout, tolerance=0.1)
        self.policy.merge()

    def update(self) -> None:
        """A first step of Adam, in which every trained weight moves by 1e-6."""
        generator = torch.Generator().manual_seed(0)
        for master in self.optimizer.masters.values():
            gradient = torch.randn(master.shape, generator=generator)
            if master.weight.dtype == torch.float32:
                # its own master, which takes what a backward pass has left
                master.weight.grad = gradient
            else:
                master.gradient = gradient
        self.optimizer.step(0, ALONE)


def test_nothing_is_found_where_nothing_is_wrong(engine: Any, folder: Any) -> None:
    run = Run(folder[USUAL])
    for version in range(3):
        report = run.sync.push(engine, version)
        assert (report.compared, report.unread) == (21, ())
        run.update()


def test_a_skipped_layer_is_named(engine: Any, folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(folder[USUAL])
    run.sync.push(engine, 0)
    run.update()
    load = HeldWeights.tandem_load

    def without_a_layer(self: Any, weights: Any = None, path: str | None = None) -> Any:
        return load(self, ((name, w) for name, w in weights if "layers.1.mlp.down_proj" not in name), path)

    monkeypatch.setattr(HeldWeights, "tandem_load", without_a_layer)
    with pytest.raises(SyncError, match=r"model.layers.1.mlp.down_proj.weight .* differ, by at most"):
        run.sync.push(engine, 1)


def test_an_old_adapter_is_named(engine: Any, folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(folder[USUAL], lora=True)
    run.sync.push(engine, 0)
    run.update()
    monkeypatch.setattr(Adapter, "merge", lambda self: None)
    with pytest.raises(SyncError, match=r"_proj that is not merged from the adapter of now: .* by up to"):
        run.sync.push(engine, 1)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_wrong_temperature_is_named(
    engine: Any, folder: Any, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    run = Run(folder[SHARP])
    run.sync.push(engine, 0)
    run.update()
    settings = vllm_engine.sampling_settings

    def of_another_temperature(*args: Any) -> dict[str, Any]:
        right = settings(*args)
        return {**right, "temperature": right["temperature"] * factor}

    monkeypatch.setattr(vllm_engine, "sampling_settings", of_another_temperature)
    with pytest.raises(SyncError, match="because of the temperature: the engine samples at") as told:
        run.sync.push(engine, 1)
    named = float(str(told.value).partition("samples at ")[2].partition(",")[0])
    assert abs(named - factor) < 0.06


def test_a_truncation_is_named(engine: Any, folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(folder[SHARP])
    run.sync.push(engine, 0)
    settings = vllm_engine.sampling_settings
    monkeypatch.setattr(vllm_engine, "sampling_settings", lambda *args: {**settings(*args), "top_k": 10})
    with pytest.raises(SyncError, match="top-k: the engine keeps the 10 most probable"):
        run.sync.push(engine, 1)


def test_a_prefix_cache_that_is_kept_is_named(
    engine: Any, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(folder[USUAL])
    run.sync.push(engine, 0)
    run.update()
    monkeypatch.setattr(vllm_engine.VLLMEngine, "forget_prompts", lambda self: None)
    with pytest.raises(SyncError, match="found 64 tokens of a prompt in its cache after the weight update"):
        run.sync.push(engine, 1)


def test_a_stop_token_that_is_ignored_is_named(
    engine: Any, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(folder[USUAL], stop_token_ids=tuple(range(0, VOCABULARY, 3)))
    run.sync.push(engine, 0)
    settings = vllm_engine.sampling_settings
    without = {"stop_token_ids": list[int]()}
    monkeypatch.setattr(vllm_engine, "sampling_settings", lambda *args: {**settings(*args), **without})
    with pytest.raises(EngineError, match="by its stop tokens and limit it is"):
        run.sync.push(engine, 1)


@pytest.mark.parametrize("engine", [torch.float32], indirect=True)
def test_a_stale_head_is_named(engine: Any, folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses float32, which vLLM packs on every CPU; bfloat16 only where there are instructions for it.

    It must be the last test of this file, since its engine replaces the other one.
    """
    run = Run(folder[USUAL], dtype=torch.float32)
    run.sync.push(engine, 0)
    run.update()
    with monkeypatch.context() as patch:
        patch.setattr(HeldWeights, "tandem_pack_head", lambda self: None)
        expected = r"version 1 does not hold lm_head.weight \(the packed copy\) .* by"
        with pytest.raises(SyncError, match=expected):
            run.sync.push(engine, 1)
    # with the head packed again nothing differs
    run.sync.push(engine, 2)
