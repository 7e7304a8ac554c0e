"""docs/settings.md from the config tree: every key, its kind, its default and its docstring."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlhf.algos.table import ALGORITHMS
from rlhf.config.errors import OTHER_NAMES
from rlhf.config.reward import RewardFunction
from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.run import Config
from rlhf.rewards.plugin import RewardSpec

HEAD = """# Settings

<!-- written by `make docs` from rlhf/config/; edit the docstrings there -->

Every key of a config file, with its default. On the command line a key is written with dots:
`rlhf train mine.yaml learner.lr=2e-6 rollout.group_size=16`. The value is YAML: `data.eval=null`,
`rollout.stop_token_ids=[2, 7]`. An unknown key is refused, and its nearest neighbour named. `RUN/config.yaml`
holds every setting in force.
"""
INTRO = {
    "algorithm": (
        "`name` is one of the table below or `path/file.py:function` (`algorithm: NAME` alone takes its "
        "defaults, and `algorithm=NAME` on the command line drops what the file has); the other keys are the "
        "keyword arguments of that function, so they differ by algorithm. "
        "What each means: [algorithms.md](algorithms.md)."
    ),
    "reward.functions": (
        "A list; each entry has these keys. See [Add a reward](../CONTRIBUTING.md#add-a-reward)."
    ),
    "model.lora": "See [lora.md](lora.md).",
    "monitor": "See [monitoring.md](monitoring.md).",
    "budget": (
        "See [Budget](algorithms.md#budget-how-many-completions-a-prompt-gets) and "
        "[knapsack.md](knapsack.md)."
    ),
}


OTHER_HEAD = """## Coming from TRL or verl

What they and others call a setting, by the last part of its name; the command says it too. A batch is
counted in prompts here, a microbatch in tokens, and `steps` are rounds of rollouts: `rlhf check` says how
many passes over the data they are.

| here | there |
|---|---|
"""


def _other_names() -> str:
    return "".join(
        f"| `{ours.replace(' and ', '`, `')}` | {', '.join(f'`{other}`' for other in others)} |\n"
        for ours, others in OTHER_NAMES.items()
    )


def render() -> str:
    parts = [HEAD, *_sections(Config, "")]
    parts.append("## algorithm\n\n" + INTRO["algorithm"] + "\n\n" + _algorithms())
    parts.append(OTHER_HEAD + _other_names())
    parts.append(
        "# Settings of a reward model\n\nWith `task: reward_model` ([algorithms.md](algorithms.md)); "
        "`model`, `learner`, `checkpoint` and `monitor` are as above unless they stand here.\n"
    )
    parts += _sections(RewardModelConfig, "", known=set(_tables(Config)))
    return "\n".join(parts).rstrip() + "\n"


def undocumented() -> list[str]:
    """Keys without a docstring."""
    return [
        f"{prefix}{key}"
        for schema in (Config, RewardModelConfig)
        for prefix, section in _walk(schema, "")
        for key, info in section.model_fields.items()
        if _inner(info) is None and not _meaning(section, key)
    ]


def _sections(schema: type[BaseModel], prefix: str, known: set[str] = frozenset()) -> Iterator[str]:  # pyright: ignore[reportArgumentType]
    for where, section in _walk(schema, prefix):
        table = _table(section)
        if table is None or table in known:
            continue
        name = where.rstrip(".")
        intro = " ".join(filter(None, (_own_docstring(section), INTRO.get(name, ""))))
        yield f"## {name or 'the run'}\n\n" + (f"{intro}\n\n" if intro else "") + table


def _tables(schema: type[BaseModel]) -> Iterator[str]:
    return (table for _, section in _walk(schema, "") if (table := _table(section)) is not None)


def _walk(schema: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, schema
    for key, info in schema.model_fields.items():
        inner = _inner(info)
        if inner is not None:
            yield from _walk(inner, f"{prefix}{key}.")


def _table(section: type[BaseModel]) -> str | None:
    rows = [
        f"| `{key}` | {_kind(info)} | {_default(info)} | {_meaning(section, key)} |\n"
        for key, info in section.model_fields.items()
        if (_inner(info) is None or typing.get_origin(info.annotation) is tuple) and key != "algorithm"
    ]
    return "| key | value | default | meaning |\n|---|---|---|---|\n" + "".join(rows) if rows else None


def _inner(info: FieldInfo) -> type[BaseModel] | None:
    """The section behind a key: `Section`, `Section | None`, or the entries of a list of them."""
    kinds = [info.annotation, *typing.get_args(info.annotation)]
    return next((k for k in kinds if inspect.isclass(k) and issubclass(k, BaseModel)), None)


def _kind(info: FieldInfo) -> str:
    bounds = [bound for m in info.metadata for bound in _bounds(m)]
    return ", ".join([_words(info.annotation), *dict.fromkeys(bounds)])


def _bounds(metadata: Any) -> Iterator[str]:
    if isinstance(metadata, FieldInfo):
        for inner in metadata.metadata:
            yield from _bounds(inner)
    for name, sign in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        if hasattr(metadata, name):
            yield f"{sign} {getattr(metadata, name):g}"
    if hasattr(metadata, "min_length"):
        yield f"at least {getattr(metadata, 'min_length')}"  # noqa: B009


def _words(kind: Any) -> str:
    """A type for people: `int | None` is "whole number or none"."""
    simple = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        types.NoneType: "none",
    }
    if kind in simple:
        return simple[kind]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is typing.Annotated:
        return ", ".join([_words(parts[0]), *(b for m in parts[1:] for b in _bounds(m))])
    if origin is tuple and parts[-1] is Ellipsis:
        return f"list of {_words(parts[0])}"
    if origin is tuple:
        return "[" + ", ".join(_words(part) for part in parts) + "]"
    if origin is dict:
        return "mapping"
    if inspect.isclass(kind) and issubclass(kind, BaseModel):
        return "the keys below"
    raise AssertionError(f"no words for {kind}")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    return "none" if value is None else f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _meaning(section: type[BaseModel], key: str) -> str:
    text = _docstrings(section).get(key, "")
    if not text and section is RewardFunction:
        text = _docstrings(RewardSpec).get(key, "")
    return text.replace("|", r"\|")


@cache
def _docstrings(kind: type) -> dict[str, str]:
    """The string under each attribute, those of base classes included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith("rlhf"):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
            ):
                text = ast.literal_eval(after.value)
                found[node.target.id] = " ".join(text.split())
    return found


def _own_docstring(section: type[BaseModel]) -> str:
    """Only one written for this class: pydantic's own is inherited."""
    text = section.__dict__.get("__doc__") or ""
    return " ".join(text.split())


def _algorithms() -> str:
    rows = ["| name | keys and defaults |\n|---|---|\n"]
    nested = "| key | value | default | meaning |\n|---|---|---|---|\n"
    for name, factory in ALGORITHMS.items():
        keys = [
            f"`{key}`" if p.default is p.empty else f"`{key} = {_said(p.default)}`"
            for key, p in inspect.signature(factory).parameters.items()
        ]
        rows.append(f"| `{name}` | {', '.join(keys)} |\n")
    for prefix, kind in sorted(_nested().items()):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            default = "none" if field.default is None else f"`{_plain(field.default)}`"
            meaning = _docstrings(kind).get(field.name, "")
            nested += f"| `{prefix}.{field.name}` | {_words(hints[field.name])} | {default} | {meaning} |\n"
    return (
        "".join(rows)
        + "\nA key written with braces is a section; in the braces stands what the algorithm has "
        "otherwise than the defaults here:\n\n" + nested
    )


def _nested() -> dict[str, type]:
    """The sections among the arguments of any algorithm."""
    return {
        key: type(p.default)
        for factory in ALGORITHMS.values()
        for key, p in inspect.signature(factory).parameters.items()
        if dataclasses.is_dataclass(p.default)
    }


def _said(default: Any) -> str:
    """A nested section as what differs from its class's own defaults."""
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return "none" if default is None else _plain(default)
    changed = [
        f"{f.name}: {_plain(value)}"
        for f in dataclasses.fields(default)
        if (value := getattr(default, f.name)) != f.default and value is not None
    ]
    return "{" + ", ".join(changed) + "}" if changed else "{...}"
