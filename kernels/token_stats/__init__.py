"""Log-probability, entropy and exact KL per token from hidden states, without storing the logits."""

from rlhf.kernels.token_stats.api import token_stats, whole
from rlhf.kernels.token_stats.logits import logit_stats
from rlhf.kernels.token_stats.state import IGNORED, TokenStats

__all__ = ["IGNORED", "TokenStats", "logit_stats", "token_stats", "whole"]
