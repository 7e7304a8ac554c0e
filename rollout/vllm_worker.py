"""`HeldWeights` under the name that servers of one's own are started with; its code is in vllm/worker.py."""

from rlhf.rollout.vllm.worker import HeldWeights

__all__ = ["HeldWeights"]
