"""Imports the classes and functions that `environment.path` names, tells their shapes, makes instances."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from rlhf.environments.calls import Parser, parser_of
from rlhf.environments.observations import Texts
from rlhf.environments.protocol import Reply
from rlhf.environments.randomness import seed_generators
from rlhf.environments.shapes import (
    Conversation,
    Episode,
    ToolEpisode,
    VerifiersEpisode,
    Wait,
    parameters,
    takes_any,
    verifiers_state,
)
from rlhf.environments.spec import EnvironmentSpec
from rlhf.environments.tools import schema_of
from rlhf.plugins import load_object
from rlhf.rewards.signature import parameters_of

RESERVED = ("reset", "respond", "get_reward", "setup_state", "env_response", "is_completed")
"""Names of methods that are asked by the trainer; no tool can have them."""
LOADER = "load_environment"
"""Name of the function that verifiers calls for an environment."""


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment of the run, from which instances are made."""

    name: str
    made_of: type | None
    """The class; None: functions alone, or an object of verifiers."""
    params: Mapping[str, Any]
    parser: Parser
    tools: Mapping[str, tuple[Callable[..., Any], Any]] = field(default_factory=dict[str, Any])
    """Function and schema of each tool by its name; a method is not bound to an instance yet."""
    methods: frozenset[str] = frozenset()
    """Those of the tools that are methods."""
    shared: Any = None
    """The object of verifiers, for all episodes of the process."""

    @property
    def schemas(self) -> list[Any]:
        return [schema for _, schema in self.tools.values()]

    @property
    def requires(self) -> list[str]:
        """Columns that `reset` cannot do without."""
        if self.made_of is None:
            return []
        needed = parameters(cast(Any, self.made_of).reset)
        named = [name for name, p in needed.items() if p.default is p.empty]
        return [name for name in named[1:] if name != "seed"]

    @property
    def gives_rewards(self) -> bool:
        """Whether it has a reward of its own."""
        return hasattr(self.made_of or self.shared, "get_reward")

    def begin(self, columns: Mapping[str, Any], seed: int, wait: Wait) -> tuple[Episode, Reply]:
        """A new instance that has been reset, and what it said. Any exception means that it is lost."""
        seed_generators(seed)
        if self.shared is not None:
            state = verifiers_state(columns)
            given = frozenset(state)
            returned = wait(self.shared.setup_state(state)) if hasattr(self.shared, "setup_state") else None
            state = cast(dict[str, Any], returned) if isinstance(returned, dict) else state
            return VerifiersEpisode(self.name, self.shared, wait, state, given), Reply()
        if self.made_of is None:
            return ToolEpisode(self.name, None, wait, self.tools, self.parser), Reply()
        instance = self.made_of(**_with_seed(self.made_of, self.params, seed))
        tools = {
            name: (getattr(instance, name) if name in self.methods else function, schema)
            for name, (function, schema) in self.tools.items()
        }
        named = parameters(instance.reset)
        given = columns if takes_any(instance.reset) else {k: v for k, v in columns.items() if k in named}
        texts = Texts()
        returned = wait(instance.reset(**_with_seed(instance.reset, given, seed)))
        said = texts.messages(returned, f"reset of {self.name}")
        made = (
            ToolEpisode(self.name, instance, wait, tools, self.parser)
            if self.tools
            else Conversation(self.name, instance, wait)
        )
        return made, Reply(tuple(said), truncated=texts.truncated)


def load(spec: EnvironmentSpec) -> dict[str, Environment]:
    """The environments by name. Raises ValueError, which names it, for what is none; others are passed on."""
    parser = parser_of(spec.calls)
    functions: list[Callable[..., Any]] = []
    found: list[tuple[str, Any]] = []
    for path in spec.paths:
        value = load_object(path)
        if inspect.isfunction(value) and value.__name__ != LOADER:
            functions.append(value)
        elif inspect.isclass(value) or inspect.isfunction(value):
            found.append((path, value))
        else:
            raise ValueError(f"environment {path} must be a class or a function, got {value!r:.80}")
    schemas = _schemas(functions, "tool", spec.schemas)
    if not found:
        if spec.params:
            raise ValueError(f"environment.params are for classes, but {spec.path} has functions only")
        name = "+".join(schemas)
        return {name: Environment(name, None, {}, parser, _together(name, functions, schemas))}
    environments = [_environment(path, value, spec, parser, functions, schemas) for path, value in found]
    names = [environment.name for environment in environments]
    if len(set(names)) < len(names):
        raise ValueError(f"two environments have the same name: {', '.join(names)}; rename one of them")
    return {environment.name: environment for environment in environments}


def _environment(
    path: str,
    found: Any,
    spec: EnvironmentSpec,
    parser: Parser,
    functions: Sequence[Callable[..., Any]],
    schemas: Mapping[str, Any],
) -> Environment:
    who = f"environment {path}"
    named, _ = parameters_of(who, found, spec.params)
    missing = [k for k, p in named.items() if p.default is p.empty and k not in spec.params and k != "seed"]
    if missing:
        raise ValueError(f"{who} needs the argument {missing[0]!r}: set it in environment.params")
    if inspect.isfunction(found) or hasattr(found, "env_response"):
        return _of_verifiers(path, found, spec, parser)
    name = found.__name__
    if not callable(getattr(found, "reset", None)):
        raise ValueError(
            f"{who} has no method reset, which begins an episode: add `def reset(self, **columns): ...`"
        )
    methods = {
        key: method
        for key, method in inspect.getmembers(found, inspect.isfunction)
        if not key.startswith("_") and key not in RESERVED
    }
    if hasattr(found, "respond"):
        if len(parameters(found.respond)) != 2 or functions:
            raise ValueError(
                f"{who} has the method respond(messages) of an environment that converses freely; it cannot "
                "be a tool, or stand beside tools: rename it"
            )
        return Environment(name, found, spec.params, parser)
    own = _schemas(list(methods.values()), f"tool {name}", spec.schemas, name)
    tools = _together(name, [*methods.values(), *functions], {**own, **schemas})
    if not tools:
        raise ValueError(
            f"{who} is none of the shapes that are understood: it has no tool (a public method with type "
            "hints and a docstring), and neither respond(messages) nor env_response(messages, state)"
        )
    if both := own.keys() & schemas.keys():
        raise ValueError(f"{who} has a tool {min(both)!r}, and so has environment.path: rename one")
    return Environment(name, found, spec.params, parser, tools, frozenset(methods))


def _of_verifiers(path: str, found: Any, spec: EnvironmentSpec, parser: Parser) -> Environment:
    shared = found(**spec.params)
    name = type(shared).__name__
    for method in ("env_response", "is_completed"):
        function = getattr(shared, method, None)
        if function is None:
            raise ValueError(
                f"environment {path} has no method {method}: add "
                f"`async def {method}(self, messages, state): ...`"
            )
        named = parameters(function)
        if other := [k for k, p in named.items() if p.default is p.empty and k not in ("messages", "state")]:
            raise ValueError(
                f"environment {path}: {method} takes {other[0]!r}, but it is given `messages` and `state`"
            )
    return Environment(name, None, {}, parser, shared=shared)


def _schemas(
    functions: Sequence[Callable[..., Any]], called: str, known: Mapping[str, Any] | None, owner: str = ""
) -> dict[str, Any]:
    """The schema of each function by its name; those `known` are of another process."""
    schemas: dict[str, Any] = {}
    for function in functions:
        name = function.__name__
        if name in RESERVED:
            raise ValueError(
                f"a tool cannot be called {name}, the name of a method that the trainer calls: rename it"
            )
        if name in schemas:
            raise ValueError(f"two tools have the name {name}: rename one of them")
        who = f"{called}.{name}" if owner else f"{called} {name}"
        schemas[name] = schema_of(function, who) if known is None else known[f"{owner}.{name}"]
    return schemas


def _together(
    name: str, functions: Sequence[Callable[..., Any]], schemas: Mapping[str, Any]
) -> dict[str, tuple[Callable[..., Any], Any]]:
    return {function.__name__: (function, schemas[function.__name__]) for function in functions}


def _with_seed(called: Callable[..., Any], given: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
    """What is given by name, and the seed where there is a parameter of this name and nothing for it."""
    return {"seed": seed, **given} if "seed" in parameters(called) else given
