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
from collections.abc import Iterator, Mapping, Sequence
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


def sent_weights(source: WeightSource) -> Iterator[tuple[str, Tensor]]:
    """Every weight, a tied one under each of its names."""
    own = source.module.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        if isinstance(tensor, nn.Parameter):
            names.setdefault(id(tensor), []).append(name)
    for name, tensor in source.named_tensors():
        others = names.get(id(own.get(name)), [])
        for alias in (name, *(other for other in others if other != name)):
            yield alias, tensor.detach()


def prove(engine: str, holder: Holder, source: WeightSource, version: int, dtype: torch.dtype) -> Proven:
    """Raises SyncError naming the first weight that differs, by how much, and how many more do."""
    sent = {name: looked_at(weight, version).to(dtype) for name, weight in sent_weights(source)}
    expected = {name: digest(part) for name, part in sent.items()}
    held = holder.digests(list(sent), version)
    wrong = differing(expected, held)
    if wrong:
        name, copy = wrong[0]
        what = _difference(sent[name].float(), holder.part(name, copy, version), dtype)
        more = sorted({other for other, _ in wrong} - {name})
        rest = f"; {len(more)} more differ: {', '.join(more[:5])}" if more else ""
        raise SyncError(
            f"{engine} at version {version} does not hold {name} ({copy}) as it was sent: {what}{rest}"
        )
    unread = tuple(name for name in sent if not held.get(name))
    return Proven(len(sent) - len(unread), unread, expected)


def differing(
    expected: Mapping[str, str], held: Mapping[str, Mapping[str, str]]
) -> list[tuple[str, str]]:
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
