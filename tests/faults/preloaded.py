"""Modules that are imported once, by the process from which the processes of the tests are forked."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: F401
import torch
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import rlhf.cli
import rlhf.monitoring.report.page  # noqa: F401
import tests.faults.processes  # noqa: F401
from tests.figures import no_figures

torch.set_num_threads(1)
for place, name, value in no_figures():
    setattr(place, name, value)
