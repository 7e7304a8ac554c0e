"""Modules that are imported once, by the process from which the processes of the tests are forked."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

from rlhf.monitoring.report import plots

torch.set_num_threads(1)


def no_figure(*_: object) -> str:
    return ""


# the figures of the report would take two thirds of the time of such a small run
plots.curve = plots.stack = no_figure
