"""Verifies after a weight update, bit for bit, that an engine holds the weights it was sent.

At a learning rate of 1e-6 an update changes one bfloat16 weight in a thousand, by its last bit. A head that
was not updated then shifts log-probs by less than their rounding, so comparing log-probs cannot show it.
Therefore the weights themselves are compared: every sync looks at a share of each matrix,

    columns  v mod p, v mod p + p, v mod p + 2p, ...      p = ceil(width / 64), v = version

and at the whole of each vector, so each number is compared once in p syncs. An engine answers with a digest
for every copy that it keeps of a weight. A weight that was packed for a matrix product is read back through
that product (rollout/vllm/worker.py), because the engine computes with the packed copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rlhf.rollout.engine import SyncError, WeightSource

COLUMNS = 64
"""Most columns of a matrix compared in one sync; always more than half as many, if it has them."""


@runtime_checkable
class Holder(Protocol):
    """An engine process that can report the weights it holds."""

    def digests(self, names: Sequence[str], version: int) -> Mapping[str, Mapping[str, str]]:
        """Digests by weight and by copy of it; a weight that cannot be read has no copies."""
        ...

    def part(self, name: str, copy: str, version: int) -> Tensor:
        """The share that the digest was computed from, in float32."""
        ...


@dataclass(frozen=True, slots=True)
class Proven:
    """Result of a proof: `compared` weights are as they were sent, the `unread` ones could not be read."""

    compared: int
    unread: tuple[str, ...]
    expected: Mapping[str, str]
    """Digests of the weights sent, by name."""


def compared_share(weight: Tensor, version: int) -> Tensor:
    """The share of a weight that the sync of `version` compares: of a matrix `[columns, rows]`."""
    if weight.ndim < 2:
        return weight
    matrix = weight.flatten(1)
    return matrix[:, columns(matrix.shape[1], version)].t()


def columns(width: int, version: int) -> slice:
    parts = -(-width // COLUMNS)
    return slice(version % parts, None, parts)


def digest(part: Tensor) -> str:
    """Digest of the bits; -0.0 and subnormal numbers count as 0, since a product may flush them."""
    part = torch.where(part.abs() < torch.finfo(part.dtype).tiny, torch.zeros_like(part), part)
    flat = part.detach().cpu().contiguous().flatten()
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Sent:
    """What was sent in an update, as far as it is compared."""

    digests: Mapping[str, str]
    """Digest of each weight by name; a tied weight is there under each of its names."""
    part: Callable[[str], Tensor]
    """The share of a weight that its digest was computed from."""


class Aliases:
    """All names of each weight of a source; a tied weight has several and is sent under one of them."""

    def __init__(self, source: WeightSource) -> None:
        self._own = source.module.state_dict(keep_vars=True)
        self._names: dict[int, list[str]] = {}
        for name, tensor in self._own.items():
            if isinstance(tensor, nn.Parameter):
                self._names.setdefault(id(tensor), []).append(name)

    @property
    def all(self) -> list[str]:
        return list(self._own)

    def of(self, name: str) -> tuple[str, ...]:
        others = self._names.get(id(self._own.get(name)), [])
        return (name, *(other for other in others if other != name))


def sent_weights(source: WeightSource, version: int, dtype: torch.dtype) -> Sent:
    """Copies the shares that are compared, since the weights may be freed before the comparison."""
    aliases, parts, digests = Aliases(source), dict[str, Tensor](), dict[str, str]()
    for sent, weight in source.named_tensors():
        part = compared_share(weight.detach(), version).to(dtype, copy=True)
        for name in aliases.of(sent):
            parts[name], digests[name] = part, digest(part)
    return Sent(digests, parts.__getitem__)


def prove(engine: str, holder: Holder, sent: Sent | WeightSource, version: int, dtype: torch.dtype) -> Proven:
    """Compares what an engine holds with what it was sent.

    Raises SyncError with the first weight that differs, by how much, and how many more differ.
    """
    if not isinstance(sent, Sent):
        sent = sent_weights(sent, version, dtype)
    expected = sent.digests
    held = holder.digests(list(expected), version)
    wrong = differing(expected, held)
    if wrong:
        name, copy = wrong[0]
        # the sent share may still be on the learner's GPU; the held one may have come from another process
        ours, theirs = sent.part(name).float().cpu(), holder.part(name, copy, version).cpu()
        what = _difference(ours, theirs, dtype)
        more = sorted({other for other, _ in wrong} - {name})
        rest = f"; {len(more)} more differ: {', '.join(more[:5])}" if more else ""
        raise SyncError(
            f"{engine} at version {version} does not hold {name} ({copy}) as it was sent: {what}{rest}"
        )
    unread = tuple(name for name in expected if not held.get(name))
    return Proven(len(expected) - len(unread), unread, expected)


def differing(expected: Mapping[str, str], held: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    """The pairs of weight and copy whose digest is not that of the weight sent."""
    return [
        (name, copy)
        for name, wanted in expected.items()
        for copy, found in held.get(name, {}).items()
        if found != wanted
    ]


def _difference(sent: Tensor, held: Tensor, dtype: torch.dtype) -> str:
    if held.shape != sent.shape:
        return (
            f"its compared share has shape {tuple(held.shape)}, that of the sent weight {tuple(sent.shape)}"
        )
    if dtype == torch.float32 and torch.equal(held, sent.bfloat16().float()):
        return "its dtype is bfloat16, but the learner computes in float32"
    apart = (held - sent).abs()
    if not torch.isfinite(apart).all():
        return "it has infinite or NaN numbers; the weights may have diverged"
    count = int((apart > 0).sum())
    return (
        f"{count} of the {apart.numel()} numbers compared differ, by at most {apart.max().item():.3g} "
        f"where numbers are up to {sent.abs().max().item():.3g}"
    )
