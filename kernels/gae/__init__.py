"""Generalised advantage estimation (GAE) over packed sequences."""

from rlhf.kernels.gae.api import Gae, gae

__all__ = ["Gae", "gae"]
