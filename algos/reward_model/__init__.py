"""What reward models learn, as pure functions on tensors: losses, rankings, heads fitted to ratings."""

from rlhf.algos.reward_model.losses import bradley_terry, rating_loss

__all__ = ["bradley_terry", "rating_loss"]
