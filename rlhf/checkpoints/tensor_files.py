"""Tensor files of a checkpoint (safetensors): whole tensors, and shards marked with their rows.

A reader asks for a tensor or for some of its rows, and gets them from all files that hold a part of them. So
a checkpoint that two ranks have saved can be loaded by one rank or by four.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rlhf.checkpoints.stateful import TensorFiles
from rlhf.distributed.shards import first_row, is_sharded, own_rows

ROWS = "rows"
"""Key of the metadata in which a file of shards has the first row and the whole shape of each tensor."""
# its annotations are too incomplete for a strict check
_safe_open: Any = safe_open


class SavedTensors(Mapping[str, Tensor]):
    """Tensors by name, from one or several files of a checkpoint; each is read when it is asked for."""

    def __init__(self, files: Sequence[Path], device: str | torch.device) -> None:
        self._device = str(device)
        # first row, whole shape and file of each piece of a tensor
        self._pieces: dict[str, list[tuple[int, tuple[int, ...], Any]]] = {}
        for path in files:
            file = _safe_open(str(path), framework="pt", device=self._device)
            metadata: dict[str, str] = file.metadata() or {}
            rows: dict[str, Any] = json.loads(metadata.get(ROWS, "{}"))
            for name in file.keys():  # noqa: SIM118, it is no mapping
                first, shape = rows[name] if rows else (0, file.get_slice(name).get_shape())
                self._pieces.setdefault(name, []).append((first, tuple(shape), file))

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._pieces[name][0][1]

    def __getitem__(self, name: str) -> Tensor:
        pieces = self._pieces[name]
        if len(pieces) == 1:
            return pieces[0][2].get_tensor(name)
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `[start, stop)` of a tensor, from all files that hold some of them."""
        parts: list[Tensor] = []
        for first, _, file in sorted(self._pieces[name], key=lambda piece: piece[0]):
            piece = file.get_slice(name)
            last = first + piece.get_shape()[0]
            if max(start, first) < min(stop, last):
                parts.append(piece[max(start, first) - first : min(stop, last) - first])
        if parts:
            return torch.cat(parts)
        # no rows: the slice has the type and the other dimensions
        return self._pieces[name][0][2].get_slice(name)[:0]


def rows_like(saved: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """The part of a saved tensor that this rank holds of `like`: all of it, or this rank's rows."""
    if not is_sharded(like):
        return saved[name]
    start = first_row(like)
    stop = start + len(own_rows(like))
    return saved.rows(name, start, stop) if isinstance(saved, SavedTensors) else saved[name][start:stop]


@dataclass(frozen=True, slots=True)
class TensorFile:
    """One file that a rank writes."""

    name: str
    tensors: dict[str, Tensor]
    rows: dict[str, tuple[int, list[int]]]
    """First row and whole shape of each tensor, in a file of shards; else empty."""


def tensor_files(tensors: TensorFiles, *, rank: int, copy: bool) -> list[TensorFile]:
    """The files that a rank writes: rank 0 all whole tensors, and every rank its rows of sharded ones.

    `copy`: also copies tensors that are on the host already, so that the run can go on and change them.
    """
    files: list[TensorFile] = []
    for name, group in tensors.items():
        _assert_nothing_shared(name, {key: own_rows(t) for key, t in group.items()})
        whole = {key: t for key, t in group.items() if not is_sharded(t)}
        shards = {key: t for key, t in group.items() if is_sharded(t)}
        if rank == 0 and (whole or not shards):
            files.append(TensorFile(f"{name}.safetensors", _on_host(whole, copy), {}))
        if shards:
            rows = {key: (first_row(t), list(t.shape)) for key, t in shards.items()}
            files.append(TensorFile(f"{name}.rank{rank:05d}.safetensors", _on_host(shards, copy), rows))
    return files


def _on_host(tensors: Mapping[str, Tensor], copy: bool) -> dict[str, Tensor]:
    own = {key: own_rows(t).detach() for key, t in tensors.items()}
    return {key: t.to("cpu", copy=copy).contiguous() for key, t in own.items()}


def _assert_nothing_shared(file: str, tensors: Mapping[str, Tensor]) -> None:
    """Asserts that no two tensors overlap in memory: they would be saved twice and loaded apart."""
    filled = {name: t for name, t in tensors.items() if t.numel()}
    spans = sorted((str(t.device), t.data_ptr(), _extent(t), name) for name, t in filled.items())
    for (device, start, extent, name), (next_device, next_start, _, next_name) in pairwise(spans):
        assert device != next_device or start + extent <= next_start, (
            f"{file}: {name} and {next_name} share memory; save one of them and tie them again after loading"
        )


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last one, gaps included."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
