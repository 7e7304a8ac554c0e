"""vLLM in this process: the real one, on a CPU or a GPU."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rlhf.rollout.engine import generate
from tests.rollout.conformance import CHECKS, TOLERANCE, Check, Source, conforming_model, worst
from tests.rollout.models import request
from tests.rollout.vllm.support import needs_vllm, sampled_model

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return conforming_model()


@pytest.fixture(scope="module")
def started(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One engine for all tests of this file: it takes seconds to start."""
    from rlhf.rollout.vllm.in_process import VLLMEngine

    engine = VLLMEngine(sampled_model(model, tmp_path_factory, kv_cache_gib=0.25))
    yield engine
    engine.close()


@pytest.fixture
def engine(started: Any, model: PreTrainedModel) -> Any:
    started.update_weights(Source(model), 0)
    return started


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_vllm_conforms(engine: Any, model: PreTrainedModel, check: Check) -> None:
    check(engine, model)
    assert engine.poll() == []


def test_a_prompt_that_is_too_long_is_refused(engine: Any) -> None:
    with pytest.raises(ValueError, match="was started for 512"):
        engine.submit([request(500, max_tokens=100)])
    assert engine.poll() == []


def test_every_weight_is_compared(engine: Any, model: PreTrainedModel) -> None:
    report = engine.update_weights(Source(model), 0)
    # the head has no weight of its own, and is held twice
    assert (report.compared, report.unread) == (len(list(model.parameters())) + 1, ())


def test_what_the_learner_does_afterwards_does_not_reach_the_engine(
    engine: Any, model: PreTrainedModel
) -> None:
    learner = conforming_model()
    engine.update_weights(Source(learner), 1)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(1.0)
    requests = [request(9, n=4)]
    assert worst(model, requests, generate(engine, requests)) < TOLERANCE


def test_the_process_is_as_it_was(engine: Any) -> None:
    # vLLM puts a function in its place that does nothing
    assert not inspect.isfunction(torch.set_num_threads)
    assert "LD_PRELOAD" not in os.environ


def test_there_is_one_engine_a_process(engine: Any) -> None:
    with pytest.raises(ValueError, match="in this process already"):
        type(engine)(engine._model)
