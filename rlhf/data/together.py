"""Which lines of a dataset are drawn together: a counterfactual beside what it is one of."""

from __future__ import annotations

import difflib
import json

from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.data.completions import OfflineDataset


def families(config: Config, data: OfflineDataset) -> list[list[int]]:
    """The groups, by index, that a step draws together: those with one value of `data.together_column`.

    Without that setting each group is alone. Raises ConfigError: there is no such column, or no whole number
    of families fits in a step.
    """
    column, per_step = config.data.together_column, config.rollout.prompts_per_step
    if column is None:
        return [[index] for index in range(len(data.groups))]
    if column not in data.columns:
        near = difflib.get_close_matches(column, data.columns, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"data.together_column is {column!r}, but {data.source} has no such column, only "
            f"{', '.join(data.columns) or 'those of the completions'}{hint}"
        )
    found: dict[str, list[int]] = {}
    for index, group in enumerate(data.groups):
        found.setdefault(json.dumps(group.prompt.columns[column], default=repr), []).append(index)
    first, *others = found.items()
    for value, members in others:
        if len(members) != len(first[1]):
            raise ConfigError(
                f"{data.source}: {len(first[1])} lines have {column} = {first[0]}, but {len(members)} have "
                f"{value}, the first in {data.groups[members[0]].prompt.id}: lines that are drawn together "
                "(data.together_column) must be equally many"
            )
    if per_step % len(first[1]):
        raise ConfigError(
            f"rollout.prompts_per_step is {per_step}, but {len(first[1])} lines each are drawn together "
            f"(data.together_column = {column}): set it to a multiple of {len(first[1])}"
        )
    return list(found.values())
