"""Episodes that have begun and not ended (rlhf/collect/episodes.py runs them)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rlhf.environments.conversation import Conversation
from rlhf.environments.protocol import Ending, Lost, Message, Reply
from rlhf.rollout.engine import RolloutRequest
from rlhf.rollout.episode import Episode, Observation, Turn
from rlhf.types import Completion, FinishReason, Prompt

Begun = tuple[Message, ...] | Lost
"""What the reset of a sample has put behind its prompt."""


@dataclass(slots=True, eq=False)
class RunningEpisode:
    """One episode that has not ended."""

    group: RunningGroup
    index: int
    prompt: Prompt
    turns: list[Turn] = field(default_factory=list[Turn])
    messages: list[Message] = field(default_factory=list[Message])
    replies: list[Reply] = field(default_factory=list[Reply])
    reason: FinishReason = FinishReason.STOP

    @property
    def key(self) -> str:
        return f"{self.group.request.prompt.id}#{self.index}"

    @property
    def tokens(self) -> list[int]:
        return [token for turn in self.turns for token in turn.token_ids]

    @property
    def num_turns(self) -> int:
        """How many turns the policy has had."""
        return sum(isinstance(turn, Completion) for turn in self.turns)

    @property
    def last_sample(self) -> tuple[str, int]:
        """The engine's sample of the last turn: id of its request, and index."""
        if self.num_turns == 1:
            return self.group.request.prompt.id, self.index
        return f"{self.key}/{self.num_turns - 1}", 0

    def next_prompt(self, conversation: Conversation) -> Prompt:
        """That of the next turn: everything up to now, with the places of all its images."""
        first, find = self.prompt, conversation.placeholders
        ids, images = list(first.token_ids), list(first.images or ())
        places = find(ids) if images else []
        for turn in self.turns:
            if isinstance(turn, Observation) and turn.images:
                places += find(turn.token_ids, len(ids))
                images += turn.images
            ids += turn.token_ids
        return replace(
            first,
            id=f"{self.key}/{self.num_turns}",
            token_ids=tuple(ids),
            images=tuple(images) or None,
            image_places=tuple(places) if images else None,
        )

    def ended(self, ending: Ending, lost: Lost | None) -> Episode:
        """The episode, of which the environment says this."""
        return Episode(
            prompt=self.prompt,
            index=self.index,
            turns=tuple(self.turns),
            finish_reason=self.reason,
            messages=tuple(self.messages),
            environment=self.group.name,
            rewards=_rewards(self.group.name, ending.reward),
            state=ending.state,
            calls=sum(reply.calls for reply in self.replies),
            errors=sum(reply.errors for reply in self.replies),
            malformed=sum(reply.malformed for reply in self.replies),
            truncated=sum(reply.truncated for reply in self.replies),
            lost=None if lost is None else lost.message,
        )


@dataclass(slots=True, eq=False)
class RunningGroup:
    """The samples of one request."""

    number: int
    request: RolloutRequest
    name: str
    running: list[RunningEpisode] = field(default_factory=list[RunningEpisode])
    begun: dict[int, Begun] = field(default_factory=dict[int, Begun])
    done: dict[int, Episode] = field(default_factory=dict[int, Episode])


@dataclass(slots=True, eq=False)
class Decoding:
    """One request that the engine has: the episodes whose turns it samples, and how many are missing."""

    episodes: list[RunningEpisode]
    missing: int


def _rewards(name: str, reward: float | Mapping[str, float] | None) -> Mapping[str, float]:
    """The environment's own reward by objective."""
    if reward is None:
        return {}
    return {name: reward} if isinstance(reward, (int, float)) else reward
