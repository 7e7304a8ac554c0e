"""Random generators of each episode, although all episodes of a process use the same functions.

An environment draws with `random.randint` or `numpy.random.rand`, whose generator belongs to the process, so
the episodes of other threads would draw from it in between. In a process of environments these functions use
a generator of the episode that calls them, found by a context variable: it is the same in the episode's
thread and in what it awaits. So the samples of a prompt, which begin with the same seed, begin alike, and an
episode can be repeated. What an environment draws in threads of its own, and from the generator of torch, is
not covered; it can take the argument `seed` of `reset` or of its constructor, or a process of its own
(`isolation: episode`).
"""

from __future__ import annotations

import random
import sys
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any, cast

_generators: ContextVar[dict[str, Any] | None] = ContextVar("generators", default=None)
"""The generators of this episode by module; None outside of episodes."""


def give_each_episode_its_own() -> None:
    """Has the functions of `random`, and of numpy if it is imported, use the generator of their episode."""
    _divert(random, cast(Any, random)._inst)
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None:
        _divert(numpy, numpy.mtrand._rand)


def seed_generators(seed: int) -> None:
    """Seeds the generators of the episode that calls it, and that of torch, which belongs to the process."""
    generators: dict[str, Any] = {"random": random.Random(seed)}
    numpy: Any = sys.modules.get("numpy.random")
    if hasattr(numpy, "RandomState"):
        generators["numpy.random"] = numpy.RandomState(seed % 2**32)
    _generators.set(generators)
    # another thread may be importing it right now
    seed_torch: Any = getattr(sys.modules.get("torch"), "manual_seed", None)
    if seed_torch is not None:
        seed_torch(seed % 2**63)


def _divert(module: ModuleType, shared: Any) -> None:
    """Replaces the functions of a module that are methods of its `shared` generator, and `seed`."""
    for name, function in list(vars(module).items()):
        is_seed = name == "seed" and not isinstance(function, partial)
        if is_seed or getattr(cast(Any, function), "__self__", None) is shared:
            setattr(module, name, partial(_draw, module.__name__, shared, name))


def _draw(module: str, shared: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    own = (_generators.get() or {}).get(module, shared)
    return getattr(own, name)(*args, **kwargs)
