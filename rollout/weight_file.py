"""A safetensors file that is written tensor by tensor, so that nobody has to hold all of them.

The format begins with a table of what is where. Room is left for it, and it is filled in at the end; what is
left over is blanks, which the format allows.
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
"""Bytes of one entry of the table beside the name: type, shape and two offsets at their longest."""


class WeightFile:
    """`with WeightFile(path, names) as file: file.add(name, tensor)`; of `names` some may stay out."""

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._room = 64 + sum(len(json.dumps(name)) + ENTRY for name in names)
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._file = path.open("wb")
        self._file.write(bytes(8 + self._room))
        self.bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError: there is such a weight already. OSError: the disk is full."""
        if name in self._entries:
            raise ValueError(f"weight {name!r} is sent twice")
        # a copy: memory that numpy has seen can never be given up, and a gathered weight has to be
        held = tensor.detach().to("cpu", copy=True).contiguous()
        begin, self.bytes = self.bytes, self.bytes + held.nbytes
        place = {"dtype": TYPES[held.dtype], "shape": list(held.shape), "data_offsets": [begin, self.bytes]}
        self._entries[name] = place
        self._file.write(held.flatten().view(torch.uint8).numpy().data)

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A file that was given up has no table, and is none."""
        with self._file:
            if error is None:
                table = json.dumps(self._entries).encode()
                assert len(table) <= self._room, "a weight was added whose name was not given before"
                self._file.seek(0)
                self._file.write(self._room.to_bytes(8, "little") + table.ljust(self._room))
