"""The section `environment`: what answers the policy between its turns (docs/environments.md)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rlhf.config.section import Positive, Section


class EnvironmentConfig(Section):
    """An environment that answers the policy between its turns: a class or a tool of the user's."""

    path: tuple[str, ...] = ()
    """`my.py:Calculator`, a class, or `my.py:multiply`, a function that becomes a tool. Several classes are
    for a dataset whose column `environment` names the one of each line; functions are tools of all of them.
    Not given: a completion is one turn."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""
    max_turns: Positive = 8
    """Most turns of the policy in one episode."""
    timeout: Annotated[float, Field(gt=0.0)] = 30.0
    """Seconds that an environment has for one answer; beyond them the episode is lost."""
    workers: Positive | None = None
    """Processes that hold the environments; not given: this rank's share of the cores, at most 8."""
    memory_gib: Annotated[float, Field(gt=0.0)] = 4.0
    """Most memory of one of these processes."""
    variables: tuple[str, ...] = ()
    """Names of environment variables that the environment needs, such as keys of services. It gets those that
    every program needs (`PATH`, `HOME`, ...), those that a `key_variable` in `params` names, and these, no
    others."""
    calls: str = "json_tags"
    """How the policy writes calls of tools. `json_tags`: `<tool_call>{"name": ..., "arguments": ...}
    </tool_call>`. `python`: `[name(argument=value)]`. Or `my.py:function` from a text to a list of calls."""
    isolation: Literal["worker", "episode"] = "worker"
    """`worker`: a process holds many episodes, each in a thread of its own, so what they share (globals,
    class attributes, files) must be safe for threads; with the process all of them are lost. `episode`: each
    has a process of its own, and the global random generators for itself."""

    @field_validator("path", mode="before")
    @classmethod
    def may_be_one(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given
