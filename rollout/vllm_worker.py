"""Import path of `HeldWeights` for servers that users start themselves; the code is in `vllm/worker.py`."""

from rlhf.rollout.vllm.worker import HeldWeights

__all__ = ["HeldWeights"]
