"""What an instance is at the end: its public attributes and its reward; and the seeds at its beginning."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from typing import Any

from rlhf.environments.observations import WrongAnswer, plain
from rlhf.rewards.workers.return_values import is_finite, read_scores

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
    scores = read_scores(value, name)
    if not is_finite(scores):
        raise WrongAnswer(f"get_reward of {name} must return finite numbers, got {value!r:.80}")
    return scores if isinstance(value, Mapping) else scores[name]


def seed_generators(seed: int) -> None:
    """Seeds the global generators of `random`, and of numpy and torch where they are imported.

    They belong to the process. With `isolation: worker` other episodes draw from them in between, so only
    what an instance draws at once, in its constructor or at the beginning of `reset`, is the same for the
    same seed; an instance that must be repeatable uses the argument `seed` of `reset` or of its constructor,
    or has a process of its own (`isolation: episode`).
    """
    random.seed(seed)
    # another thread may be importing them right now
    seed_numpy: Any = getattr(sys.modules.get("numpy.random"), "seed", None)
    if seed_numpy is not None:
        seed_numpy(seed % 2**32)
    seed_torch: Any = getattr(sys.modules.get("torch"), "manual_seed", None)
    if seed_torch is not None:
        seed_torch(seed % 2**63)
