"""Imported once by the process that all others are forked from."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

from rlhf.monitoring.report import plots

torch.set_num_threads(1)


def no_picture(*_: object) -> str:
    return ""


# two thirds of the time of such a small run would go into the pictures of its report
plots.curve = plots.stack = no_picture
