"""`rlhf eval --revise N`: the model improves its own answers N times, each time behind the last one alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from rlhf.collect.sampler import Sampler
from rlhf.config.section import ConfigError
from rlhf.data.revision import REFERENCE, Reviser
from rlhf.types import Completion, Group, Prompt, Trajectory

STANDS = "stands"
"""Entry of what is logged of an answer whose revision was not kept."""


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
    objectives: dict[str, float] = field(default_factory=dict[str, float])
    """The mean of each objective over the answers that have it."""


def revised(
    sampler: Sampler,
    reviser: Reviser,
    groups: Sequence[Group],
    number: int,
    *,
    while_above: str | None = None,
) -> list[Group]:
    """Asks for a better answer than each of these, and scores those; `number`: that of the round.

    Where prompts improve an answer of the data, rewards see the last answer as `reference`. With an objective
    `while_above` an answer stays where that of its revision is not above 0, and is not asked about again.

    Raises ChatError: the chat template cannot write a second question; ConfigError: no such objective.
    """
    asked = list(_asked(groups))
    if not asked:
        return list(groups)
    requests = [
        sampler.request(
            reviser.prompt(prompt, groups[i].trajectories[j].token_ids),
            n=1,
            label=f"eval/{prompt.id}/revision {number} of sample {j}",
        )
        for prompt, i, places in asked
        for j in places
    ]
    answers = iter(completion for [completion] in sampler.generate(requests))
    of_each: list[list[Completion]] = []
    placed: list[list[tuple[int, int]]] = []
    for _, i, places in asked:
        own = {(i, j): answer for j in places if isinstance(answer := next(answers), Completion)}
        placed.append(list(own))
        of_each.append([replace(answer, index=n) for n, answer in enumerate(own.values())])
    # rewards see the first question
    scored, _ = sampler.score([prompt for prompt, _, _ in asked], of_each, 0)
    new = {
        place: t
        for places, g in zip(placed, scored, strict=True)
        for place, t in zip(places, g.trajectories, strict=True)
    }
    kept: list[Group] = []
    for i, group in enumerate(groups):
        own = [_kept(t, new.get((i, j)), while_above) for j, t in enumerate(group.trajectories)]
        kept.append(replace(group, trajectories=tuple(own)))
    return kept


def _asked(groups: Sequence[Group]) -> Iterator[tuple[Prompt, int, list[int]]]:
    """What is scored together: a prompt, the number of its group, and which of its answers are revised.

    Where rewards see the answer that was to be improved, each answer has a prompt of its own.
    """
    for i, group in enumerate(groups):
        places = [j for j, t in enumerate(group.trajectories) if STANDS not in t.logged]
        own = group.prompt.question_tokens is not None
        if places and not own:
            yield group.prompt, i, places
        for j in places if own else ():
            columns = {**group.prompt.columns, REFERENCE: group.trajectories[j].text}
            yield replace(group.prompt, columns=columns), i, [j]


def _kept(before: Trajectory, after: Trajectory | None, objective: str | None) -> Trajectory:
    """The revision, if it is better by the objective; else the answer before it, marked as standing."""
    if after is None:
        return before
    if objective is None:
        return after
    if after.reward is not None and objective not in after.objectives:
        known = ", ".join(after.objectives)
        raise ConfigError(f"--revise-while: no reward function gives {objective!r}; there is {known}")
    if after.objectives.get(objective, 0.0) > 0:
        return after
    return replace(before, logged={**before.logged, STANDS: "true"})


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
        objectives={name: sum(values) / len(values) for name, values in _by_objective(new).items()},
    )


def _by_objective(trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for name, value in trajectory.objectives.items():
            found.setdefault(name, []).append(value)
    return found


def describe_revision(number: int, revision: Revision) -> str:
    """A round as a line for the user."""
    reward = "none" if revision.reward is None else f"{revision.reward:.4f}"
    total = sum(map(len, revision.texts))
    return (
        f"revision {number:<4}accuracy {revision.accuracy:.4f}, reward {reward}, {revision.changed} of "
        f"{total} answers changed, {revision.mean_tokens:.1f} tokens"
    )
