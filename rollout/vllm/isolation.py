"""Restores what vLLM changes in the learner's process: random generators, environment, process group."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


@contextmanager
def restored_generator() -> Generator[None]:
    """Restores the state of torch's global CPU generator."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def restored_process_state() -> Generator[None]:
    """Restores what vLLM changes at its start: it seeds all generators, changes environment variables that
    child processes inherit, and replaces `torch.set_num_threads`.

    Warnings are hidden: vLLM's imports warn of future changes in other packages, which users cannot act on.
    """
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    environ, set_num_threads = dict(os.environ), torch.set_num_threads
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        torch.set_num_threads = set_num_threads
        for name in set(os.environ) - set(environ):
            if not name.startswith("VLLM_"):
                del os.environ[name]
        os.environ.update(environ)


@contextmanager
def kept_process_group(*, kept: bool) -> Generator[None]:
    """Keeps a closing engine from ending the default process group, if `kept` (the group is the run's own).

    Groups that vLLM made from it are ended in any case.
    """
    module: Any = dist
    end = module.destroy_process_group

    def end_others(group: Any = None) -> None:
        if group is not None:
            end(group)

    if kept:
        module.destroy_process_group = end_others
    try:
        yield
    finally:
        module.destroy_process_group = end
