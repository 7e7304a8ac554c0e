"""Imported once by the process that all others are forked from."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import rlhf.cli
import rlhf.plots
import rlhf.report_page
import rlhf.trainer

torch.set_num_threads(1)


def no_picture(*_: object) -> str:
    return ""


# two thirds of the time of such a small run would go into the pictures of its report
rlhf.plots.curve = rlhf.plots.stack = no_picture
