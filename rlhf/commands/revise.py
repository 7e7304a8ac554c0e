"""`rlhf eval --revise N`: the model improves its own answers N times, each time behind the last one alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf.collect.sampler import Sampler
from rlhf.data.revision import Reviser
from rlhf.types import Completion, Group


@dataclass(frozen=True, slots=True)
class Revision:
    """What a round of revisions gives, over all samples of all prompts."""

    accuracy: float
    reward: float | None
    """The mean reward of the answers that have one."""
    changed: int
    """Answers that differ from those of the round before."""
    mean_tokens: float
    texts: list[list[str]]
    """The answers of each prompt."""


def revised(sampler: Sampler, reviser: Reviser, groups: Sequence[Group], number: int) -> list[Group]:
    """Asks for a better answer than each of these, and scores those; `number`: that of the round.

    Raises ChatError: the chat template cannot write a second question.
    """
    asked = [(g, i) for g in groups for i in range(len(g.trajectories))]
    requests = [
        sampler.request(
            reviser.prompt(g.prompt, g.trajectories[i].token_ids),
            n=1,
            label=f"eval/{g.prompt.id}/revision {number} of sample {i}",
        )
        for g, i in asked
    ]
    answers = iter(completion for [completion] in sampler.generate(requests))
    of_prompt: list[list[Completion]] = []
    for group in groups:
        own = [next(answers) for _ in group.trajectories]
        of_prompt.append([replace(a, index=i) for i, a in enumerate(own) if isinstance(a, Completion)])
    # rewards see the first question
    scored, _ = sampler.score([g.prompt for g in groups], of_prompt, 0)
    return scored


def measure_revision(before: Sequence[Group], after: Sequence[Group], correct: Sequence[bool]) -> Revision:
    """`correct`: of each answer of `after`, prompt by prompt."""
    old = [t.text for g in before for t in g.trajectories]
    new = [t for g in after for t in g.trajectories]
    rewards = [t.reward for t in new if t.reward is not None]
    return Revision(
        accuracy=sum(correct) / len(correct),
        reward=sum(rewards) / len(rewards) if rewards else None,
        changed=sum(t.text != text for t, text in zip(new, old, strict=True)),
        mean_tokens=sum(sum(t.loss_mask) for t in new) / len(new),
        texts=[[t.text for t in g.trajectories] for g in after],
    )


def describe_revision(number: int, revision: Revision) -> str:
    """A round as a line for the user."""
    reward = "none" if revision.reward is None else f"{revision.reward:.4f}"
    total = sum(map(len, revision.texts))
    return (
        f"revision {number:<4}accuracy {revision.accuracy:.4f}, reward {reward}, {revision.changed} of "
        f"{total} answers changed, {revision.mean_tokens:.1f} tokens"
    )
