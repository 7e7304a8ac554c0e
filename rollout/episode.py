"""`Episode`: what is sampled for one prompt where an environment answers between the policy's turns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf.metrics import Mean, Metrics
from rlhf.tensors.candidates import Candidates
from rlhf.types import (
    Completion,
    FinishReason,
    Image,
    Images,
    Observed,
    Prompt,
    Source,
    Trajectory,
    VersionSpan,
)


@dataclass(frozen=True, slots=True)
class Observation:
    """What the environment answered, as tokens: from behind the policy's turn to the opening of its next."""

    token_ids: tuple[int, ...]
    images: tuple[Image, ...] = ()
    """In the order of their placeholders, of which `token_ids` holds as many as the model needs."""


Turn = Completion | Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """The turns of the policy and the observations between them, and what the environment says of the whole.

    The policy's tokens are those that the engine returned; its text is never tokenised again.
    """

    prompt: Prompt
    """The prompt with what the environment put behind it (`reset`)."""
    index: int
    """Place in its group, `0 .. n-1`."""
    turns: tuple[Turn, ...]
    finish_reason: FinishReason
    """LENGTH: a turn was cut, or an observation found no room; STOP otherwise."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """Everything behind the prompt as chat messages: assistant, tool, assistant, ..."""
    environment: str = ""
    """The name of the environment."""
    rewards: Mapping[str, float] = field(default_factory=dict[str, float])
    """What the environment itself gives, by objective."""
    state: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The public attributes of the environment at the end, which reward functions get."""
    calls: int = 0
    """Calls of tools that were carried out."""
    errors: int = 0
    """Those of them that raised an exception."""
    malformed: int = 0
    """Calls that could not be read."""
    truncated: int = 0
    """Texts of the environment that were too long and have been cut."""
    lost: str | None = None
    """Why the environment could not go on. Such an episode has no reward and is not learned from."""

    @property
    def prompt_id(self) -> str:
        return self.prompt.id

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens behind the prompt, observations included."""
        return tuple(token for turn in self.turns for token in turn.token_ids)

    @property
    def completions(self) -> list[Completion]:
        """The policy's turns."""
        return [turn for turn in self.turns if isinstance(turn, Completion)]


Sample = Completion | Episode
"""What sampling returns for one place in a group: one turn, or several."""


def trajectory_of(
    sample: Sample, *, text: str, reward: float | None, objectives: Mapping[str, float]
) -> Trajectory:
    """The trajectory of a completion or an episode."""
    if isinstance(sample, Completion):
        return Trajectory.single_turn(sample, text=text, reward=reward, objectives=objectives)
    return of_turns(
        sample.turns,
        finish_reason=sample.finish_reason,
        text=text,
        reward=reward,
        objectives=objectives,
        messages=sample.messages,
    )


def of_turns(
    turns: Sequence[Turn],
    *,
    finish_reason: FinishReason,
    text: str,
    reward: float | None,
    objectives: Mapping[str, float],
    messages: tuple[Mapping[str, Any], ...] = (),
) -> Trajectory:
    """A trajectory of turns and the observations between them, as in the example of `Trajectory`.

    Tokens of an observation count to the turn before it, have log-prob 0.0 and no candidates. Log-probs are
    None where one turn has none; so is the source of a turn that is not the policy's.
    """
    completions = [turn for turn in turns if isinstance(turn, Completion)]
    known = all(c.rollout_logprobs is not None for c in completions)
    logprobs, mask, numbers = list[float](), list[bool](), list[int]()
    versions, candidates, observed = list[VersionSpan](), list[Candidates](), list[Observed]()
    number = -1
    for turn in turns:
        own, start, size = isinstance(turn, Completion), len(mask), len(turn.token_ids)
        number += own
        mask += [own] * size
        numbers += [max(number, 0)] * size
        logprobs += (turn.rollout_logprobs or ()) if isinstance(turn, Completion) else [0.0] * size
        if isinstance(turn, Completion):
            versions += [VersionSpan(v.version, v.start + start, v.end + start) for v in turn.versions]
        candidates.append(_candidates(turn))
        if isinstance(turn, Observation) and turn.images:
            images = Images(f"{completions[0].prompt_id}, observation at token {start}", turn.images)
            observed.append(Observed(start, start + size, images))
    truncated = any(c.candidates is not None for c in completions)
    return Trajectory(
        token_ids=tuple(token for turn in turns for token in turn.token_ids),
        loss_mask=tuple(mask),
        turns=tuple(numbers),
        rollout_logprobs=tuple(logprobs) if known else None,
        finish_reason=finish_reason,
        versions=tuple(versions),
        text=text,
        reward=reward,
        objectives=objectives,
        candidates=Candidates.join(candidates) if truncated and known else None,
        source=next((c.source for c in completions if c.source != Source.POLICY), Source.POLICY),
        messages=messages,
        observations=tuple(observed),
    )


def _candidates(turn: Turn) -> Candidates:
    """Those of a turn; of size 0 where nothing was truncated."""
    found = turn.candidates if isinstance(turn, Completion) else None
    if found is not None:
        return found
    none = torch.empty(0, dtype=torch.int32)
    return Candidates(none, torch.zeros(len(turn.token_ids), dtype=torch.long))


def turn_metrics(samples: Iterable[Sample]) -> Metrics:
    """Turns, calls of tools, cut texts and lost episodes: means over episodes, none where there are none."""
    episodes = [sample for sample in samples if isinstance(sample, Episode)]
    if not episodes:
        return {}
    count = float(len(episodes))

    def mean(total: float) -> Mean:
        return Mean(float(total), count)

    return {
        "turns/mean": mean(sum(len(e.completions) for e in episodes)),
        "turns/tool_calls": mean(sum(e.calls for e in episodes)),
        "turns/tool_errors": mean(sum(e.errors for e in episodes)),
        "turns/malformed": mean(sum(e.malformed for e in episodes)),
        "turns/truncated": mean(sum(e.truncated for e in episodes)),
        "turns/lost": mean(sum(e.lost is not None for e in episodes)),
        "length/observed": mean(sum(len(e.token_ids) - _own(e) for e in episodes)),
    }


def _own(episode: Episode) -> int:
    return sum(len(c.token_ids) for c in episode.completions)
