"""Our part of vLLM's worker; importing it brings the transfer of weights to the CPU."""

from __future__ import annotations

from rlhf.rollout.vllm.worker import HeldWeights
from tests.rollout.vllm.on_cpu import replacements


class OnCPU(HeldWeights):
    """Adds nothing."""


for _place, _name, _value in replacements():
    setattr(_place, _name, _value)
