"""Rows of a sharded weight (a DTensor): which rows this rank holds, and which ranks save them."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def is_sharded(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor)


def own_rows(parameter: Tensor) -> Tensor:
    """This rank's rows of a sharded weight or gradient, without a copy; a whole tensor as it is."""
    return cast(Any, parameter).detach().to_local() if isinstance(parameter, DTensor) else parameter


def first_row(parameter: Tensor) -> int:
    """Index of this rank's first row. Every rank has equally many rows, but the last ones fewer or none."""
    assert isinstance(parameter, DTensor)
    mesh: DeviceMesh = parameter.device_mesh
    # the last dimension of the mesh is the one that rows are split over
    each = -(-parameter.shape[0] // mesh.size(-1))
    return min(parameter.shape[0], each * mesh.get_local_rank(mesh.ndim - 1))


def replicas_of(parameter: Tensor) -> int:
    """How many ranks hold the same rows."""
    assert isinstance(parameter, DTensor)
    mesh: DeviceMesh = parameter.device_mesh
    return mesh.size() // mesh.size(-1)


def savers(parameter: Tensor) -> list[int]:
    """The ranks of the first group: together they hold every row once, so they save the weight."""
    assert isinstance(parameter, DTensor)
    mesh: DeviceMesh = parameter.device_mesh
    return cast(Any, mesh.mesh).reshape(-1, mesh.size(-1))[0].tolist()


def as_shard(local: Tensor, like: Tensor) -> Tensor:
    """A DTensor sharded as `like` is, of which `local` are this rank's rows."""
    sharded = cast(Any, like)
    return cast(Any, DTensor).from_local(
        local,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
