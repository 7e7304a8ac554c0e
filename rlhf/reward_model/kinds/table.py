"""The kinds of scores by name."""

from __future__ import annotations

from rlhf.config.reward_model import RewardModelConfig
from rlhf.reward_model.kinds.base import Kind
from rlhf.reward_model.kinds.gap import Gap
from rlhf.reward_model.kinds.gated import Gated
from rlhf.reward_model.kinds.pairs import Pairs
from rlhf.reward_model.kinds.ranking import Ranking
from rlhf.reward_model.kinds.ratings import Ratings
from rlhf.reward_model.kinds.steps import Steps

KINDS: dict[str, type[Kind]] = {
    "pairs": Pairs,
    "ratings": Ratings,
    "gated": Gated,
    "ranking": Ranking,
    "steps": Steps,
    "gap": Gap,
}


def kind_of(config: RewardModelConfig) -> Kind:
    """The kind that `score.kind` names."""
    return KINDS[config.score.kind](config)
