"""Weights through vLLM's weight transfer: complete on a GPU, on a CPU with replacements (on_cpu.py)."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.load import make_config
from rlhf.config.section import ConfigError
from rlhf.preflight.load import load_inputs
from rlhf.rollout.engine import generate
from tests.rollout.conformance import TOLERANCE, Source, conforming_model, moved, worst
from tests.rollout.models import EOS, VOCABULARY, request
from tests.rollout.vllm.support import PATIENCE, needs_vllm, sampled_model, server_of, wait_for
from tests.support import bandit_settings

pytestmark = needs_vllm
REQUESTS = [request(9, n=3), request(20, n=2)]


def check_updates(engine: Any, model: Any, tolerance: float) -> None:
    """Checks log-probs after updates (which compare weights themselves) and that samples in flight go on."""
    count = len(list(model.parameters())) + 1
    for version, weights in enumerate((model, like(model, moved(model)), model)):
        report = engine.update_weights(Source(weights), version)
        assert (report.version, report.compared, report.unread) == (version, count, ())
        assert report.bytes == sum(p.nbytes for p in weights.parameters())
        assert worst(weights, REQUESTS, generate(engine, REQUESTS)) < tolerance
    engine.submit([request(11, n=3, max_tokens=400)])
    engine.update_weights(Source(model), 3)
    assert len(engine.poll()) == 3


def check_return(engine: Any, model: Any, tolerance: float) -> None:
    """A server that is lost during the learner's updates gets the weights after them."""
    (lost, *others) = engine._pool.replicas
    engine.release()
    os.killpg(server_of(lost), signal.SIGKILL)
    engine._lose(lost, f"{lost} was killed")
    if others:
        wait_for(lambda: lost.healthy)
    assert not lost.ready
    other = like(model, moved(model))
    report = engine.update_weights(Source(other), 4)
    assert report.version == 4
    wait_for(lambda: lost.ready)
    for replica in others:
        replica.ready = False
    assert worst(other, REQUESTS, generate(engine, REQUESTS)) < tolerance
    for replica in others:
        replica.ready = True


def like(model: Any, other: Any) -> Any:
    """`other` on the device and in the dtype of `model`."""
    return other.to(model.device, model.dtype)


def servers(sampled: Any, replicas: int, way: Any) -> Any:
    from rlhf.rollout.vllm.server_engine import VLLMServerEngine
    from rlhf.rollout.vllm.server_pool import Service

    return VLLMServerEngine(sampled, Service(replicas=replicas, deadline=PATIENCE, transport=way))


@pytest.mark.slow
def test_both_ends_agree_on_a_cpu(tmp_path_factory: pytest.TempPathFactory, on_cpu: None) -> None:
    """For `ipc`, and for two servers, see every_case.py."""
    check_both_ends(tmp_path_factory, "nccl", 1)


def check_both_ends(factory: pytest.TempPathFactory, way: Any, replicas: int) -> None:
    from dataclasses import replace

    model = conforming_model()
    sampled = sampled_model(model, factory, kv_cache_gib=0.1)
    worker = {"worker_extension_cls": "tests.rollout.vllm.on_cpu_worker.OnCPU"}
    engine = servers(replace(sampled, args=worker), replicas, way)
    try:
        check_updates(engine, model, TOLERANCE)
        check_return(engine, model, TOLERANCE)
    finally:
        engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize(("way", "replicas"), [("ipc", 1), ("nccl", 2), ("file", 1)])
def test_weights_go_from_gpu_to_gpu(
    tmp_path_factory: pytest.TempPathFactory, way: str, replicas: int
) -> None:
    from rlhf.rollout.vllm.in_process import VLLMModel

    if way == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    model: Any = conforming_model()
    model.to("cuda", torch.bfloat16)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    args = {"gpu_memory_utilization": 0.2, "enforce_eager": True}
    sampled = VLLMModel(str(folder), torch.bfloat16, 512, VOCABULARY, (EOS,), kv_cache_gib=0.25, args=args)
    engine = servers(sampled, replicas, way)
    try:
        check_updates(engine, model, tolerance=0.3)
        check_return(engine, model, tolerance=0.3)
    finally:
        engine.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("way", ["nccl", "ipc"])
def test_without_a_gpu_it_is_refused_before_anything_starts(
    tmp_path: Path, tiny_model: Any, way: str
) -> None:
    rollout = {"engine": "vllm-server", "vllm": {"transport": way}}
    settings = bandit_settings(tmp_path, tiny_model("llama-wide"), rollout=rollout)
    with pytest.raises(ConfigError, match=f"transport is {way}, .* sees none: take auto or file"):
        load_inputs(make_config(settings))


def test_a_transport_needs_servers(tmp_path: Path, tiny_model: Any) -> None:
    rollout = {"engine": "vllm", "vllm": {"transport": "file"}}
    settings = bandit_settings(tmp_path, tiny_model("llama-wide"), rollout=rollout)
    with pytest.raises(ConfigError, match=r"set rollout\.engine=vllm-server"):
        load_inputs(make_config(settings))
