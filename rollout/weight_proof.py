"""What an engine holds after a weight update, compared bit for bit with what it was sent.

At a learning rate of 1e-6 an update moves a bfloat16 weight in a thousand by its last bit. A head that was
left behind then shifts log-probs by less than their rounding does, so no comparison of log-probs can show
it. Weights are compared themselves: every sync looks at a share of each matrix,

    columns  v mod p, v mod p + p, v mod p + 2p, ...      p = ceil(width / 64), v = version

and at all of each vector, so each number is seen once in p syncs. An engine answers with one digest a
weight, and one for every copy it keeps of it: a weight that was packed for a matrix product is read back
through that product (rollout/vllm_worker.py), for the packed numbers are the ones it samples with.
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
"""Of a matrix, looked at in one sync; fewer than twice as many in a narrow one."""


@runtime_checkable
class Holder(Protocol):
    """One engine process that can be asked for what it holds."""

    def digests(self, names: Sequence[str], version: int) -> Mapping[str, Mapping[str, str]]:
        """By weight and by copy of it; a weight it cannot read has no copies."""
        ...

    def part(self, name: str, copy: str, version: int) -> Tensor:
        """What `digests` was taken of, in float32."""
        ...


@dataclass(frozen=True, slots=True)
class Proven:
    """`compared` weights are held as they were sent; the `unread` ones could not be looked at."""

    compared: int
    unread: tuple[str, ...]
    expected: Mapping[str, str]
    """Digests of what was sent."""


def looked_at(weight: Tensor, version: int) -> Tensor:
    """The share of a weight that sync number `version` compares, `[columns, rows]` of a matrix."""
    if weight.ndim < 2:
        return weight
    matrix = weight.flatten(1)
    return matrix[:, columns(matrix.shape[1], version)].t()


def columns(width: int, version: int) -> slice:
    parts = -(-width // COLUMNS)
    return slice(version % parts, None, parts)


def digest(part: Tensor) -> str:
    """Of the bits, where -0.0 and numbers too small to be normal count as 0: a product may flush them."""
    part = torch.where(part.abs() < torch.finfo(part.dtype).tiny, torch.zeros_like(part), part)
    flat = part.detach().cpu().contiguous().flatten()
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Sent:
    """What an update hands over."""

    digests: Mapping[str, str]
    """Of each weight, a tied one under each of its names."""
    part: Callable[[str], Tensor]
    """What the digest of a weight was taken of."""


class Aliases:
    """All names of each weight of a source; a tied one has several and is sent under one of them."""

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
    """Keeps the shares that are compared, apart from weights that may be gone by then."""
    aliases, parts, digests = Aliases(source), dict[str, Tensor](), dict[str, str]()
    for sent, weight in source.named_tensors():
        part = looked_at(weight.detach(), version).to(dtype, copy=True)
        for name in aliases.of(sent):
            parts[name], digests[name] = part, digest(part)
    return Sent(digests, parts.__getitem__)


def prove(engine: str, holder: Holder, sent: Sent | WeightSource, version: int, dtype: torch.dtype) -> Proven:
    """Raises SyncError naming the first weight that differs, by how much, and how many more do."""
    if not isinstance(sent, Sent):
        sent = sent_weights(sent, version, dtype)
    expected = sent.digests
    held = holder.digests(list(expected), version)
    wrong = differing(expected, held)
    if wrong:
        name, copy = wrong[0]
        # what was sent may still be on the learner's GPU, and what is held has come over a wire
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
    """Weights and copies of them that are not as they were sent."""
    return [
        (name, copy)
        for name, wanted in expected.items()
        for copy, found in held.get(name, {}).items()
        if found != wanted
    ]


def _difference(sent: Tensor, held: Tensor, dtype: torch.dtype) -> str:
    if held.shape != sent.shape:
        return f"it has {tuple(held.shape)} numbers, {tuple(sent.shape)} were sent"
    if dtype == torch.float32 and torch.equal(held, sent.bfloat16().float()):
        return "its dtype is bfloat16, the learner computes in float32"
    apart = (held - sent).abs()
    if not torch.isfinite(apart).all():
        return "it has numbers that are not finite; the weights may have diverged"
    count = int((apart > 0).sum())
    return (
        f"{count} of the {apart.numel()} numbers compared differ, by at most {apart.max().item():.3g} "
        f"where numbers are up to {sent.abs().max().item():.3g}"
    )
