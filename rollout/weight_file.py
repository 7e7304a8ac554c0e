"""Writes a safetensors file tensor by tensor, so that not all tensors have to be in memory at once.

The format begins with a table of the tensors. Space is reserved for it and filled in at the end; the rest of
that space is padded with blanks, which the format allows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
ENTRY = 200
"""Most bytes of one entry of the table beside the name: type, shape and two offsets."""


class WeightFile:
    """Use as `with WeightFile(path, names) as file: file.add(name, tensor)`; not all names must be added."""

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._table_bytes = 64 + sum(len(json.dumps(name)) + ENTRY for name in names)
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._file = path.open("wb")
        self._file.write(bytes(8 + self._table_bytes))
        self.bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one weight. Raises ValueError if it was added before, OSError if the disk is full."""
        if name in self._entries:
            raise ValueError(f"weight {name!r} is sent twice")
        # a copy: torch cannot resize memory that numpy shares, and the memory of gathered weights is freed so
        copied = tensor.detach().to("cpu", copy=True).contiguous()
        begin, self.bytes = self.bytes, self.bytes + copied.nbytes
        place = {
            "dtype": TYPES[copied.dtype],
            "shape": list(copied.shape),
            "data_offsets": [begin, self.bytes],
        }
        self._entries[name] = place
        self._file.write(copied.flatten().view(torch.uint8).numpy().data)

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes the table, unless there was an error: a file without table cannot be read."""
        with self._file:
            if error is None:
                table = json.dumps(self._entries).encode()
                assert len(table) <= self._table_bytes, "a weight was added whose name was not given before"
                self._file.seek(0)
                self._file.write(self._table_bytes.to_bytes(8, "little") + table.ljust(self._table_bytes))
