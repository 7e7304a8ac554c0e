"""`sampling_mode` under the name that engines of one's own import; the code is in `learner_module.py`."""

from rlhf.rollout.learner_module import sampling_mode

__all__ = ["sampling_mode"]
