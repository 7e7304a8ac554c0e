"""The type that a model computes in: bfloat16 on a GPU, on a CPU whichever of bfloat16 and float32 is faster.

A CPU without bfloat16 instructions multiplies it 10 to 200 times slower than float32. Which CPUs have them is
not looked up but measured, by products of the shapes that decoding and learning have.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar, cast, get_args

import torch

from rlhf.config.overrides import load_yaml
from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.run import Config
from rlhf.devices import this_device

DType = Literal["bfloat16", "float32"]
Settings = TypeVar("Settings", bound=Config | RewardModelConfig)
ROWS = 4, 256
"""Tokens of a product: decoding has few, learning many."""
WIDTH = 576
"""Size of the square weight: that of a small model, so that it takes little time without instructions too."""
REPEATS = 5
HOPELESS = 20.0
"""Times as slow as float32 in the first two products: not measured any further."""
MUCH_SLOWER = 2.0
"""How much slower an explicit choice may be before a run warns of it."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of the same products in both types on this CPU."""

    bfloat16: float
    float32: float

    @property
    def faster(self) -> DType:
        return "bfloat16" if self.bfloat16 < self.float32 else "float32"

    def slowdown(self, dtype: DType) -> float:
        """How many times as long products take in `dtype` as in the other type."""
        ratio = self.bfloat16 / self.float32
        return ratio if dtype == "bfloat16" else 1.0 / ratio


@lru_cache(maxsize=1)
def cpu_speed() -> Speed:
    """Measured once a process, on one thread, in a fraction of a second on any CPU.

    The fastest of a few repetitions counts: other processes can only make a product slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        float32 = [_seconds(rows, torch.float32, REPEATS) for rows in ROWS]
        bfloat16 = [_seconds(rows, torch.bfloat16, 1) for rows in ROWS]
        # otherwise the first product was enough: it cannot have been so slow by chance alone
        if sum(bfloat16) < HOPELESS * sum(float32):
            bfloat16 = [_seconds(rows, torch.bfloat16, REPEATS) for rows in ROWS]
    finally:
        torch.set_num_threads(threads)
    return Speed(sum(bfloat16), sum(float32))


def _seconds(rows: int, dtype: torch.dtype, repeats: int) -> float:
    """The least that a product takes; one repetition more brings the library and its caches to work first."""
    weight, states = torch.ones(WIDTH, WIDTH, dtype=dtype), torch.ones(rows, WIDTH, dtype=dtype)
    taken: list[float] = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.nn.functional.linear(states, weight)
        taken.append(time.perf_counter() - start)
    return min(taken)


def resolve_dtype(asked: Literal["auto"] | DType, device: torch.device) -> DType:
    """The type that `auto` stands for on a device; any other answer is returned as it is."""
    if asked != "auto":
        return asked
    return "bfloat16" if device.type != "cpu" else cpu_speed().faster


def with_dtype(config: Settings, *, earlier: str | None = None) -> Settings:
    """The settings with `model.dtype` chosen for this machine where it is `auto`.

    `earlier`: RUN/config.yaml of the run that is resumed, which keeps its type.
    """
    if config.model.dtype != "auto":
        return config
    dtype: Any = None
    if earlier is not None and config.checkpoint.resume == "auto":
        model: Any = load_yaml(earlier).get("model", {})
        dtype = model.get("dtype")
    if dtype not in get_args(DType):
        dtype = resolve_dtype("auto", this_device())
    return config_with(config, dtype)


def config_with(config: Settings, dtype: str) -> Settings:
    """The settings with that `model.dtype`."""
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def slowness(dtype: str, device: torch.device) -> str | None:
    """A warning where `dtype` is much slower than the other type on this CPU; None where it is not."""
    if device.type != "cpu":
        return None
    factor = cpu_speed().slowdown(cast(DType, dtype))
    if factor < MUCH_SLOWER:
        return None
    return (
        f"model.dtype is {dtype}, in which products take {factor:.0f} times as long as in {_other(dtype)} on "
        "this CPU; model.dtype=auto takes the faster type"
    )


def in_words(dtype: str, device: torch.device) -> str:
    """The type, and on a CPU what the other one would cost."""
    if device.type != "cpu":
        return dtype
    other = _other(dtype)
    factor = cpu_speed().slowdown(other)
    cost = f"{factor:.1f} times" if factor < 10 else f"{factor:.0f} times"
    return f"{dtype} (products in {other} take {cost} as long on this CPU)"


def _other(dtype: str) -> DType:
    return "float32" if dtype == "bfloat16" else "bfloat16"
