"""What an instance is at the end of its episode: its public attributes and its reward."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from rlhf.environments.observations import WrongAnswer, plain
from rlhf.rewards.workers.return_values import is_finite, read_numbers

LONGEST_STATE = 1 << 20
"""Characters of one attribute as JSON; reward functions do not get a longer one, which is printed."""


def public_state(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes whose names do not begin with `_` and whose values JSON can hold, as JSON holds them.

    Tuples become lists, keys of dicts become texts, arrays lists of numbers.
    """
    state: dict[str, Any] = {}
    for name, value in list(variables.items()):
        if name.startswith("_"):
            continue
        try:
            text = json.dumps(value, default=plain)
        except Exception:
            # clients, locks, objects that cannot be printed: reward functions do not need them
            continue
        if len(text) > LONGEST_STATE:
            sys.stdout.write(f"the attribute {name} has {len(text)} characters and is not given to rewards\n")
            continue
        state[name] = json.loads(text)
    return state


def reward_of(value: object, name: str) -> float | dict[str, float] | None:
    """What `get_reward` returned. Raises WrongReturn or WrongAnswer for what is no finite number."""
    if value is None:
        return None
    scores = read_numbers(value, name)
    if not is_finite(scores):
        raise WrongAnswer(f"get_reward of {name} must return finite numbers, got {value!r:.80}")
    return scores if isinstance(value, Mapping) else scores[name]
