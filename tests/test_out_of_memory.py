"""Out-of-memory errors of several libraries name the setting to lower. On a CPU the errors are real ones."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np
import pytest
import torch

from rlhf.out_of_memory import memory_advice

# larger than any address space
TOO_MUCH = 1 << 50
SHORT: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
    "numpy": lambda: np.empty(TOO_MUCH, dtype=np.uint8),
    "Python": lambda: bytearray(TOO_MUCH),
    "the system": lambda: mmap.mmap(-1, TOO_MUCH),
    "the C++ library": lambda: torch.zeros(1).expand(TOO_MUCH).unbind(),
}


@pytest.mark.parametrize("who", SHORT)
def test_a_real_shortage_is_named_with_the_setting_to_lower(who: str) -> None:
    with pytest.raises((MemoryError, RuntimeError, OSError)) as raised:
        SHORT[who]()
    advice = memory_advice(raised.value, "learn, step 3")
    assert advice is not None, repr(raised.value)
    assert advice.startswith("out of memory in learn, step 3: lower learner.microbatch_tokens")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_a_shortage_of_a_gpu_is_known_by_its_words(message: str) -> None:
    assert "rollout.kv_cache_gib" in str(memory_advice(RuntimeError(message), "rollout, step 1"))


@pytest.mark.parametrize(
    "error",
    [
        # threads are also refused when there are too many processes, which no batch setting changes
        RuntimeError("can't start new thread"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        FileNotFoundError(2, "No such file or directory"),
    ],
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert memory_advice(error, "learn, step 1") is None
