"""Whether the tests of vLLM can run: `make test` installs it and says that they must."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from .models import EOS, VOCABULARY

INSTALLED = find_spec("vllm") is not None
if os.environ.get("TANDEM_TEST_VLLM") == "1" and not INSTALLED:
    raise RuntimeError("TANDEM_TEST_VLLM=1, but vllm is not installed: make setup EXTRAS=vllm")
needs_vllm = pytest.mark.skipif(not INSTALLED, reason="vllm is not installed: make setup EXTRAS=vllm")


def sampled_model(model: PreTrainedModel, folders: pytest.TempPathFactory, *, kv_cache_gib: float) -> Any:
    """What vLLM is told of `model`, whose files are written first."""
    from rlhf.rollout.vllm import VLLMModel

    folder = folders.mktemp("model")
    model.save_pretrained(folder)
    return VLLMModel(str(folder), torch.float32, 512, VOCABULARY, (EOS,), kv_cache_gib=kv_cache_gib)
