"""Staleness of tokens (updates since their policy_version): masks stale tokens, finds the oldest version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlhf.metrics import Max, Mean, Metrics
from rlhf.types import Group, Trajectory


def mask_stale_tokens(groups: Sequence[Group], *, version: int, bound: int) -> tuple[list[Group], Metrics]:
    """Takes tokens with a staleness above `bound` out of the loss mask; returns the groups and metrics.

    The staleness of a token is `version`, the current policy_version (number of updates made so far), minus
    the policy_version that sampled the token. Completions of data have no policy_version and are never
    masked. The metrics `staleness/*` cover the tokens that the policy chose: mean, maximum, share masked.
    """
    chosen: list[int] = []
    masked_groups: list[Group] = []
    for group in groups:
        trajectories: list[Trajectory] = []
        for t in group.trajectories:
            staleness = _staleness(t, version)
            if t.versions:
                chosen += [s for s, in_loss in zip(staleness, t.loss_mask, strict=True) if in_loss]
            mask = tuple(m and s <= bound for m, s in zip(t.loss_mask, staleness, strict=True))
            trajectories.append(t if mask == t.loss_mask else replace(t, loss_mask=mask))
        masked_groups.append(replace(group, trajectories=tuple(trajectories)))
    masked = float(sum(staleness > bound for staleness in chosen))
    return masked_groups, {
        "staleness/mean": Mean(float(sum(chosen)), float(len(chosen))),
        "staleness/max": Max(float(max(chosen, default=0))),
        "staleness/dropped": Mean(masked, float(len(chosen))),
    }


def oldest_version(group: Group) -> int:
    """The lowest policy_version in a group: the version that sampled its most stale token.

    The group must come from rollouts: completions of data have no policy_version.
    """
    return min(span.version for t in group.trajectories for span in t.versions)


def _staleness(trajectory: Trajectory, version: int) -> list[int]:
    """Staleness of each token, 0 for completions of data."""
    versions = [version] * len(trajectory.token_ids)
    for span in trajectory.versions:
        # tokens behind a span that are in none (a tool's answer, for example) count with that span
        versions[span.start :] = [span.version] * (len(versions) - span.start)
    return [version - sampled_by for sampled_by in versions]
