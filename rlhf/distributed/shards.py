"""Rows of a weight that is sharded over ranks (a DTensor): which are here, and who saves them."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def is_sharded(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor)


def own_rows(parameter: Tensor) -> Tensor:
    """This rank's rows of a sharded weight or gradient: the very memory."""
    return cast(Any, parameter).detach().to_local() if isinstance(parameter, DTensor) else parameter


def first_row(parameter: Tensor) -> int:
    """Where this rank's rows begin: every rank has as many, the last ones fewer or none."""
    assert isinstance(parameter, DTensor)
    mesh: DeviceMesh = parameter.device_mesh
    each = -(-parameter.shape[0] // mesh.size(-1))
    return min(parameter.shape[0], each * mesh.get_local_rank(mesh.ndim - 1))


def replicas_of(parameter: Tensor) -> int:
    """On how many ranks the same rows lie."""
    assert isinstance(parameter, DTensor)
    mesh: DeviceMesh = parameter.device_mesh
    return mesh.size() // mesh.size(-1)


def savers(parameter: Tensor) -> list[int]:
    """The ranks that hold all rows once."""
    assert isinstance(parameter, DTensor)
    mesh: DeviceMesh = parameter.device_mesh
    return cast(Any, mesh.mesh).reshape(-1, mesh.size(-1))[0].tolist()


def as_shard(local: Tensor, like: Tensor) -> Tensor:
    """`local` as this rank's rows of a tensor cut the way `like` is."""
    sharded = cast(Any, like)
    return cast(Any, DTensor).from_local(
        local,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
