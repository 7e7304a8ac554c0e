"""Old import path of `sampling_mode` for users' engines; the code is in `learner_module.py`."""

from rlhf.rollout.learner_module import sampling_mode

__all__ = ["sampling_mode"]
