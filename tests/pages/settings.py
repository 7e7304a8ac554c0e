"""Writes docs/settings.md from the config tree: each key with its type, its default and its docstring."""

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
from rlhf.config.foreign.names import OTHER_NAMES
from rlhf.config.reward import Function
from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.run import Config
from rlhf.rewards.plugin import RewardSpec

HEAD = """# Settings

<!-- written by `make docs` from rlhf/config/; edit the docstrings there -->

Every key of a config file, with its default. A heading is a section of the file, the keys below it stand in
that section. On the command line a key is written with dots, and its value is YAML:

    rlhf train mine.yaml learner.lr=2e-6 rollout.group_size=16 'rollout.stop_token_ids=[2, 7]' data.eval=null

"None" and "not given" below mean `null`. An unknown key is an error, which suggests the nearest one that
there is. `RUN/config.yaml`, in the folder `run_dir`, lists every setting of a run with its value, defaults
included.
"""
INTRO = {
    "algorithm": (
        "How the policy learns from completions and their rewards. `name` is an algorithm of the table "
        "below, or a function of your own as `path/file.py:function`. The other keys are the keyword "
        "arguments of the function, so they differ by algorithm. `algorithm: NAME` takes its defaults; "
        "`algorithm=NAME` on the command line also drops all other keys of this section that the file has. "
        "Formulas: [algorithms.md](algorithms.md)."
    ),
    "reward.functions": (
        "`reward.functions` is a list, and each entry has these keys. See [rewards.md](rewards.md) and "
        "[Add a reward](../CONTRIBUTING.md#add-a-reward)."
    ),
    "reward.constraints": (
        "`reward.constraints` is a list, and each entry has these keys. See "
        "[Several objectives](rewards.md#several-objectives)."
    ),
    "reward.preference": "See [Pairwise judges](rewards.md#pairwise-judges).",
    "model.lora": "See [lora.md](lora.md).",
    "monitor": "See [monitoring.md](monitoring.md).",
    "budget": (
        "See [Budget](algorithms.md#budget-how-many-completions-a-prompt-gets) and "
        "[knapsack.md](knapsack.md)."
    ),
}

ARGUMENTS = {
    "advantage_clip": "Bound of advantages, up and down, after `whiten`; none: no bound.",
    "alpha": (
        "`xpo` and `selm`: what the log-prob of a frozen model's sample is multiplied with in the loss "
        "(`selm`: times beta), which makes it less likely. `ofs_dpo`: the weight of the chase of the two "
        "adapters. 0: plain DPO."
    ),
    "baseline": (
        "What is taken off a reward to get the advantage. `none`: nothing. `group_mean`: the mean reward of "
        "the group. `leave_one_out`: the mean of the other rewards of the group. `prompt_value`: the frozen "
        "value of the prompt (section [prompt_value](#prompt_value))."
    ),
    "beta": (
        "Scale of the scores that a preference loss compares, of log-ratios to the reference for most: the "
        "smaller it is, the further the policy moves from the reference."
    ),
    "clip": "Bound of the ratio to the reference, which is kept in [1 - clip, 1 + clip].",
    "clip_dual": (
        "For tokens with a negative advantage: the ratio to the old policy counts as at most this (dual "
        "clip, above 1); none: no such bound."
    ),
    "clip_high": (
        "How far above 1 the ratio to the old policy may go: beyond 1 + clip_high, a token with a positive "
        "advantage has no gradient. In `cispo` the weight of a token's gradient is at most 1 + clip_high."
    ),
    "clip_low": (
        "How far below 1 the ratio to the old policy may go: beyond 1 - clip_low, a token with a negative "
        "advantage has no gradient. In `cispo` the weight of a token's gradient is at least 1 - clip_low; "
        "none: no lower bound."
    ),
    "critic": "How values are learned, and how advantages come from them.",
    "delta": "Margin from which on a pair has no loss.",
    "desirable_weight": "Factor of the loss of good completions.",
    "divergence": (
        "Given: each prompt has a temperature of its own, chosen so that the weights of its completions "
        "differ from equal ones by this KL, in nats. None: all have `temperature`."
    ),
    "drop_truncated": (
        "Whether completions that were cut at the length limit are left out of the loss (overlong "
        "filtering); their rewards are still compared with those of the group."
    ),
    "earlier_weight": (
        "Weight of the mean over the tokens of the turns before the last one, beside the mean over those of "
        "the last one."
    ),
    "entropy_coef": "Weight of the policy's entropy, which is maximised; 0: it is not in the loss.",
    "eta": (
        "`dno`: scale of the log-ratios to the iterate. `inpo`: pairs are to differ by 1 / (2 eta) nats."
    ),
    "floor": "Lower bound of a token's weight, which is its probability.",
    "gamma": "Margin that the better completion must have before the loss falls below log 2.",
    "imitation_coef": (
        "Weight of the negative log-likelihood of correct completions, which is added to the loss."
    ),
    "interval": "Steps after which the adapter with the lower loss becomes the fast one, the policy.",
    "kl": "How the distance to the reference is measured, and how much it costs.",
    "label_smoothing": (
        "Share of the labels that is taken to be wrong, below 0.5; 0 trusts all of them. `exo` needs more."
    ),
    "lam": (
        "`orpo`: weight of the odds ratio beside the negative log-likelihood. `dpop`: weight of what the "
        "better completion has lost against the reference."
    ),
    "lr_ratio": "Learning rate of the second adapter, as a share of `learner.lr`.",
    "max_reward": "Half the margin at which `chi_po` stops: it is clipped at twice this, up and down.",
    "max_tokens": (
        "Length of a completion, in tokens, that `dr_grpo` divides losses by, and from which on `dapo` and "
        "`cispo` take 1 off the reward. Not given: `rollout.max_completion_tokens`."
    ),
    "max_weight": "Upper bound of a weight exp(advantage / temperature).",
    "mismatch": "Correction for the difference between the probabilities of engine and learner.",
    "nll_coef": "Weight of the negative log-likelihood of the better completion; 0: it is not in the loss.",
    "normalize": (
        "Whether weights are divided by their mean, so that a learning rate means the same at every "
        "temperature."
    ),
    "one_sided": "Whether only right pairs are clipped: very wrong ones keep their gradient.",
    "overlong_cache": (
        "Length over which long completions are punished softly: in the last so many tokens before "
        "`max_tokens` the reward falls linearly by up to 1. 0: no punishment; none: a fifth of `max_tokens`."
    ),
    "per_token": "Whether the score of a completion is divided by its tokens.",
    "penalty": (
        "How the policy's own sample is held below the data: `logsigmoid`, log(1 + e^u), or `linear`, u, "
        "which has no lower bound."
    ),
    "ratio_penalty": (
        "Weight of log(policy / reference), which is added to the loss of each token. It makes all "
        "completions of the data less likely, so it must be small beside the advantages."
    ),
    "refill": (
        "Most further rounds of sampling in a step, to replace groups whose rewards are all equal; 0: they "
        "are left out and not replaced."
    ),
    "mix": (
        "Weight of the loss in which the model learns to answer and to improve an answer together; 1 - mix "
        "is that of the loss in which it learns to improve alone. Above 0, at most 1."
    ),
    "reward_scaling": "How rewards are scaled by those of all steps so far.",
    "standardize": (
        "Whether advantages first get mean 0 and standard deviation 1 over the experience of a step."
    ),
    "tau": (
        "`ipo`: the margin is to become 1 / (2 tau). `discopop`: how sharply its two losses are blended."
    ),
    "tau_negative": (
        "Steepness of the gate for tokens with a negative advantage: the higher, the faster the gradient "
        "fades as the ratio to the old policy moves away from 1."
    ),
    "positive": "How far an update moves tokens with a positive advantage before the drift holds it back.",
    "negative": "The same for tokens with a negative advantage.",
    "tau_positive": "The same for tokens with a positive advantage.",
    "temperature": (
        "Temperature of the weights exp(advantage / temperature): the lower, the more the best completions "
        "outweigh the others."
    ),
    "tool_coef": "Weight of the normalised tool reward in the advantages of a completion's first turn.",
    "tool_objectives": (
        "Names of the objectives that judge how a tool was called: their weighted sum is the tool reward, "
        "that of all others the outcome."
    ),
    "undesirable_weight": "Factor of the loss of bad completions.",
    "use_reference": "Whether log-ratios to the reference are compared, and not log-probs.",
    "whiten": "Whether advantages get mean 0 and standard deviation 1 over all tokens of a step.",
}
"""What the keyword arguments of algorithms mean: a function's arguments have no docstrings."""

OTHER_HEAD = """## Coming from TRL or verl

`rlhf migrate FILE` turns a script or config of verl, or a YAML file, a command or a Python file with a config
of TRL into a config of ours, with a line for each of its settings that has no counterpart; a full name of
theirs in a config is answered with ours and its value.

The settings here, and what TRL, verl and other frameworks call them (the last part of their names). A config
with such a name is refused with a hint at the setting. Here batches are counted in prompts, microbatches in
tokens, and `steps` in rounds of rollouts and updates; `rlhf check` says how many passes over the data they
are.

| here | there |
|---|---|
"""


def _other_names() -> str:
    return "".join(
        f"| `{ours.replace(' and ', '`, `')}` | {', '.join(f'`{other}`' for other in others)} |\n"
        for ours, others in OTHER_NAMES.items()
    )


def render() -> str:
    """The text of docs/settings.md."""
    parts = [HEAD, *_sections(Config, "")]
    parts.append("## algorithm\n\n" + INTRO["algorithm"] + "\n\n" + _algorithms())
    parts.append(OTHER_HEAD + _other_names())
    parts.append(
        "# Settings of a reward model\n\nThe settings of `task: reward_model` "
        "([reward_models.md](reward_models.md)). The sections `model`, `checkpoint` and "
        "`monitor` are those above.\n"
    )
    parts += _sections(RewardModelConfig, "", known=set(_tables(Config)))
    return "\n".join(parts).rstrip() + "\n"


def undocumented() -> list[str]:
    """Keys without a text: sections' settings, and keyword arguments of algorithms."""
    missing = [
        f"{prefix}{key}"
        for schema in (Config, RewardModelConfig)
        for prefix, section in _walk(schema, "")
        for key, info in section.model_fields.items()
        if _inner(info) is None and not _meaning(section, key)
    ]
    return missing + [f"algorithm.{key}" for key in _arguments() if key not in ARGUMENTS]


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
    """The type of a setting and its bounds, in words."""
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
    """The default of a setting for people, or "required"."""
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
    if not text and issubclass(section, Function):
        text = _docstrings(RewardSpec).get(key, "")
    return _escaped(text)


def _escaped(text: str) -> str:
    """Text for a cell of a table, in one line."""
    return " ".join(text.split()).replace("|", r"\|")


@cache
def _docstrings(kind: type) -> dict[str, str]:
    """The string under each attribute of a class, those of its base classes included."""
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
    """The docstring that is written in this class; an inherited one is pydantic's."""
    text = section.__dict__.get("__doc__") or ""
    return " ".join(text.split())


def _algorithms() -> str:
    """Tables of the algorithms, of their keyword arguments, and of the sections among these."""
    rows = ["| name | what it is | keys and defaults |\n|---|---|---|\n"]
    arguments = "| key | value | meaning |\n|---|---|---|\n"
    nested = "| key | value | default | meaning |\n|---|---|---|---|\n"
    for name, factory in ALGORITHMS.items():
        keys = [
            f"`{key}`" if p.default is p.empty else f"`{key} = {_said(p.default)}`"
            for key, p in inspect.signature(factory).parameters.items()
        ]
        rows.append(f"| `{name}` | {_escaped(inspect.getdoc(factory) or '')} | {', '.join(keys)} |\n")
    for key, kinds in sorted(_arguments().items()):
        arguments += f"| `{key}` | {max(kinds, key=len)} | {_escaped(ARGUMENTS[key])} |\n"
    for prefix, kind in sorted(_nested().items()):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            default = "none" if field.default is None else f"`{_plain(field.default)}`"
            meaning = _escaped(_docstrings(kind).get(field.name, ""))
            nested += f"| `{prefix}.{field.name}` | {_words(hints[field.name])} | {default} | {meaning} |\n"
    return (
        "".join(rows)
        + "\nA key without a default must be given, except `max_tokens`. What the keys mean:\n\n"
        + arguments
        + "\nA key whose default is written in braces is a section. The braces have the defaults of the "
        "algorithm that differ from those here:\n\n" + nested
    )


def _arguments() -> dict[str, list[str]]:
    """The keyword arguments of all algorithms, with the types that they have."""
    found: dict[str, list[str]] = {}
    for factory in ALGORITHMS.values():
        hints = typing.get_type_hints(factory)
        for key in inspect.signature(factory).parameters:
            kind = hints[key]
            words = "the keys below" if dataclasses.is_dataclass(kind) else _words(kind)
            found.setdefault(key, []).append(words)
    return found


def _nested() -> dict[str, type]:
    """The dataclasses among the arguments of algorithms, by the names of the arguments."""
    return {
        key: type(p.default)
        for factory in ALGORITHMS.values()
        for key, p in inspect.signature(factory).parameters.items()
        if dataclasses.is_dataclass(p.default)
    }


def _said(default: Any) -> str:
    """A default for people; of a dataclass only the fields that differ from the class's own defaults."""
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return "none" if default is None else _plain(default)
    changed = [
        f"{f.name}: {_plain(value)}"
        for f in dataclasses.fields(default)
        if (value := getattr(default, f.name)) != f.default and value is not None
    ]
    return "{" + ", ".join(changed) + "}" if changed else "{...}"
