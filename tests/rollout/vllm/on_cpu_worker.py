"""`HeldWeights` for servers whose weight transfer runs on a CPU; importing this module makes it so."""

from __future__ import annotations

from rlhf.rollout.vllm.worker import HeldWeights
from tests.rollout.vllm.on_cpu import replacements


class OnCPU(HeldWeights):
    """Named separately, so that a server imports this module."""


for _place, _name, _value in replacements():
    setattr(_place, _name, _value)
