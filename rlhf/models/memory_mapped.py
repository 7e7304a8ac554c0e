"""Frozen weights on a CPU that stay in the file they came from: resident while a pass reads them, not after.

A reference is needed for one pass of a step. Its weights, where a file has exactly these bits, are mapped
from there; behind each layer the process gives their pages up, and the next pass finds them in the system's
page cache, which may use the memory for something else in between. Ranks of one machine share them.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.models.pretrained import layer_classes
from rlhf.torch_typed import modules_by_name

_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class MemoryMappedWeights:
    """Weights of `model` that are, bit for bit, in safetensors files of a folder: taken from there."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.bytes = 0
        """Of weights that were taken."""
        self._files = [_File(path) for path in sorted(folder.glob("model*.safetensors"))]
        own = dict(model.named_parameters())
        for name, stored in (pair for file in self._files for pair in file.tensors()):
            weight = own.get(name)
            if weight is not None and weight.dtype == stored.dtype and torch.equal(weight, stored):
                weight.data = stored
                self.bytes += stored.nbytes
        names = layer_classes(model)

        def after_forward(*_: Any) -> None:
            self.give_up()

        for module in modules_by_name(model).values():
            if type(module).__name__ in names:
                module.register_forward_hook(after_forward)
        self.give_up()

    def give_up(self) -> None:
        """The pages; they come back when they are read. Raises RuntimeError: a file is not what it was."""
        for file in self._files:
            file.give_up()


class _File:
    """A safetensors file in memory (its format: the size of a header, the header, the numbers)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._opened)
        self._state = self._now()
        # nobody writes, but of a buffer that cannot be written to torch warns
        self._map = mmap.mmap(self._opened, 0, access=mmap.ACCESS_COPY)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        (size,) = struct.unpack("<Q", self._map[:8])
        header: dict[str, Any] = json.loads(self._map[8 : 8 + size])
        for name, entry in header.items():
            dtype = _TYPES.get(entry.get("dtype"))
            begin, end = entry.get("data_offsets", (0, 0))
            if dtype is not None and begin < end:
                place = {"count": (end - begin) // dtype.itemsize, "offset": 8 + size + begin}
                yield name, torch.frombuffer(self._map, dtype=dtype, **place).view(entry["shape"])

    def give_up(self) -> None:
        if self._now() != self._state:
            raise RuntimeError(f"{self._path} was written to while the reference is read from it")
        self._map.madvise(mmap.MADV_DONTNEED)

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._opened)
        return found.st_size, found.st_mtime_ns
