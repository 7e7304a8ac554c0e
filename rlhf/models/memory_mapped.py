"""Frozen weights on a CPU, memory-mapped from the model's files: they take memory only during a pass.

The reference is needed for one pass of each step. Every weight that a safetensors file holds bit for bit is
mapped from that file. After each layer the process releases the pages; the next pass reads them again from
the system's page cache, whose memory the system may use for something else in between. Ranks on one machine
share these pages.
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
    """Maps every weight of `model` that the safetensors files of `folder` hold bit for bit; others stay."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.bytes = 0
        """Total size of the weights that were mapped."""
        self._files = [_File(path) for path in sorted(folder.glob("model*.safetensors"))]
        own = dict(model.named_parameters())
        for name, stored in (pair for file in self._files for pair in file.tensors()):
            weight = own.get(name)
            if weight is not None and weight.dtype == stored.dtype and torch.equal(weight, stored):
                weight.data = stored
                self.bytes += stored.nbytes
        names = layer_classes(model)

        def after_forward(*_: Any) -> None:
            self.release_pages()

        for module in modules_by_name(model).values():
            if type(module).__name__ in names:
                module.register_forward_hook(after_forward)
        self.release_pages()

    def release_pages(self) -> None:
        """Frees the memory of the mapped weights; reading one maps it again.

        Raises RuntimeError: a file has changed since it was opened.
        """
        for file in self._files:
            file.release_pages()


class _File:
    """A memory-mapped safetensors file: the size of its header (8 bytes), the header (JSON), the numbers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._opened)
        self._state = self._size_and_time()
        # copy-on-write although nothing writes: torch warns of a buffer that is read-only
        self._map = mmap.mmap(self._opened, 0, access=mmap.ACCESS_COPY)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the file, each a view of the mapped memory."""
        (size,) = struct.unpack("<Q", self._map[:8])
        header: dict[str, Any] = json.loads(self._map[8 : 8 + size])
        for name, entry in header.items():
            dtype = _TYPES.get(entry.get("dtype"))
            begin, end = entry.get("data_offsets", (0, 0))
            if dtype is not None and begin < end:
                place = {"count": (end - begin) // dtype.itemsize, "offset": 8 + size + begin}
                yield name, torch.frombuffer(self._map, dtype=dtype, **place).view(entry["shape"])

    def release_pages(self) -> None:
        if self._size_and_time() != self._state:
            raise RuntimeError(
                f"{self._path} was written to while the reference is read from it; put the model's files "
                "back as they were and resume from a checkpoint"
            )
        self._map.madvise(mmap.MADV_DONTNEED)

    def _size_and_time(self) -> tuple[int, int]:
        """Size and time of the last change (nanoseconds) of the file."""
        found = os.fstat(self._opened)
        return found.st_size, found.st_mtime_ns
