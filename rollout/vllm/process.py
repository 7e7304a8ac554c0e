"""vLLM changes the process it runs in; what it changes is put back."""

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
def own_generator() -> Generator[None]:
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def process_left_alone() -> Generator[None]:
    """vLLM seeds every generator, changes the environment that children inherit, and blocks thread settings.

    Its imports warn of what other packages will change; nobody who trains can do anything about that.
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
def group_left_alone(*, kept: bool) -> Generator[None]:
    """An engine that ends also ends the default process group, which is the run's if it was there before.

    `kept`: it is. Groups that vLLM made of it are ended all the same.
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
