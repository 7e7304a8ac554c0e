"""`numbers`: scalars of a device as Python floats, in one transfer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def numbers(*scalars: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """The scalars as floats, by the same names: all of them leave the device in one transfer."""
    stacked = torch.stack([x for named in scalars for x in named.values()]).cpu()
    values = iter(float(x) for x in stacked.unbind())
    return [{name: next(values) for name in named} for named in scalars]
