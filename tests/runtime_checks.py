"""Checks of the shapes and types in the package's signatures while tests run.

jaxtyping's import hook wraps every function of the package, and its wrapper costs about 20 µs a call, and a
millisecond each time that a nested function is defined: two thirds of the time of a run of a tiny model. So
here only functions and dataclasses with shapes in their annotations get that wrapper. Other functions are
checked by beartype alone, and nested functions without shapes not at all.
"""

from __future__ import annotations

import dataclasses
import inspect
import random
import re
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jaxtyping
import pytest

_jaxtyped: Any = jaxtyping.jaxtyped


def install() -> None:
    """To be called before the package is imported. Does nothing without beartype."""
    if not find_spec("beartype"):
        return
    # beartype checks one random element of a list, drawn from the generator that it binds when imported. It
    # gets its own one, so that checks, also those in background threads, do not advance the global generator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "getrandbits", random.Random(0).getrandbits)
        import_module("beartype")
    # the import hook decorates with what has this name
    jaxtyping.jaxtyped = _checked
    # without the numeric tower an int would be refused for a float
    jaxtyping.install_import_hook(
        "rlhf", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    )


def _checked(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Takes the place of `jaxtyping.jaxtyped`."""

    def decorate(thing: Any) -> Any:
        if _has_shapes(thing):
            return _jaxtyped(thing, typechecker=typechecker)
        if not inspect.isclass(thing):
            return thing if "<locals>" in _function_of(thing).__qualname__ else typechecker(thing)
        if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = typechecker(thing.__init__)
        return thing

    return decorate


def _has_shapes(thing: Any) -> bool:
    """Whether a name in its annotations is one of jaxtyping's, or stands for a type made of them."""
    if dataclasses.is_dataclass(thing):
        names = vars(sys.modules[thing.__module__])
        hints = [field.type for field in dataclasses.fields(thing)]
    elif inspect.isclass(thing):
        return False
    else:
        names = _function_of(thing).__globals__
        hints = list(_function_of(thing).__annotations__.values())
    found = {name for hint in hints for name in re.findall(r"\w+", str(hint))}
    return any(type(names.get(name)).__module__.startswith("jaxtyping") for name in found)


def _function_of(thing: Any) -> Any:
    """The function within a property, a class method or a static method; or the function itself."""
    return getattr(thing, "fget", None) or getattr(thing, "__func__", thing)
