"""Reads the settings out of a file of verl or TRL: a shell script, a YAML file, or Python."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from rlhf.config.foreign.given import flat
from rlhf.config.foreign.verl import ROOTS
from rlhf.config.overrides import load_yaml
from rlhf.config.section import ConfigError

OVERRIDE = re.compile(r"[+~]*(?P<key>[A-Za-z_]\w*(\.\w+)+)=(?P<value>.*)", re.DOTALL)
VARIABLE = re.compile(r"\$(?:\{(?P<long>\w+)(?::?-(?P<default>[^}]*))?\}|(?P<short>\w+))")
ASSIGNED = re.compile(r"^\s*(?:export\s+)?(?P<name>\w+)=(?P<value>[^\s#]*)", re.MULTILINE)
METHODS = {"trl": "grpo", "onlinedpo": "dpo", "nashmd": "nash_md", "reward": "reward_model"}


@dataclass
class Found:
    """The settings of a file."""

    framework: str
    """`verl` or `TRL`."""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """By their dotted names; those of TRL have no dots."""
    method: str = "grpo"
    """TRL's trainer, by the name of the algorithm."""
    unknown: dict[str, str] = field(default_factory=dict[str, str])
    """Settings whose values are computed by code, and that code."""


def read(path: Path) -> Found:
    """The settings in the file. Raises ConfigError: there is no such file, or it has none of either."""
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".py":
        found = _python(text, path)
    elif path.suffix in (".yaml", ".yml"):
        found = _yaml(text, path)
    else:
        found = _shell(text)
    if found is None or not (found.settings or found.unknown):
        raise ConfigError(
            f"{path} has no settings of verl (actor_rollout_ref.rollout.n=8 and the like, in a script or as "
            "YAML) or of TRL (a YAML file, a script with `trl grpo --...`, or Python with GRPOConfig(...))"
        )
    return found


def _yaml(text: str, path: Path) -> Found | None:
    try:
        tree = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        return None
    settings = dict(flat(cast(dict[str, Any], tree)))
    if any(key.startswith(tuple(f"{root}." for root in ROOTS)) for key in settings):
        return Found("verl", settings)
    return Found("TRL", cast(dict[str, Any], tree), _method_of(settings))


def _shell(text: str) -> Found | None:
    """Overrides of verl anywhere in the script, else the options behind `trl METHOD`."""
    variables = {"HOME": "~"} | {m["name"]: m["value"].strip("'\"") for m in ASSIGNED.finditer(text)}
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError:
        words = text.replace("\\\n", " ").split()
    words = [_expanded(word, variables) for word in words]
    matches = [found for word in words if (found := OVERRIDE.fullmatch(word.rstrip(")")))]
    settings = {m["key"]: _value(m["value"]) for m in matches}
    if any(key.startswith(tuple(f"{root}." for root in ROOTS)) for key in settings):
        return Found("verl", settings)
    script = re.search(r"(?:^|\s)trl\s+(\w+)|/(\w+)\.py\s", text)
    options = _options(words)
    return Found("TRL", options, _method(script[1] or script[2]) if script else "grpo") if options else None


def _options(words: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for place, word in enumerate(words):
        if not word.startswith("--") or len(word) < 3:
            continue
        name, equals, value = word[2:].partition("=")
        after: list[str] = []
        for other in words[place + 1 :]:
            if other.startswith("-") and not re.match(r"-\d", other):
                break
            after.append(other)
        if equals or not after:
            options[name] = _value(value) if equals else True
        else:
            options[name] = _value(after[0]) if len(after) == 1 else [_value(item) for item in after]
    return options


def _expanded(word: str, variables: Mapping[str, str]) -> str:
    """The word with the script's own variables put in; others stay as they are written."""
    for _ in range(4):  # a variable may name another
        word = VARIABLE.sub(lambda m: variables.get(m["long"] or m["short"], m["default"] or m[0]), word)
    return word


def _value(text: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


def _python(text: str, path: Path) -> Found | None:
    """Arguments of calls of `...Config` and `...Trainer`, and of `LoraConfig`."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise ConfigError(f"{path}: {error.msg} in line {error.lineno}") from None
    names = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = Found("TRL")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        kind = re.fullmatch(r"(\w+?)(Config|Trainer)", called)
        if called == "LoraConfig":
            found.settings |= {"use_peft": True} | _arguments(node, names, found, "lora_")
        elif kind and kind[1] in ("GRPO", "RLOO", "DPO", "KTO", "ORPO", "CPO", "BCO", "SFT", "PPO"):
            found.method = _method(kind[1])
            found.settings |= _arguments(node, names, found, "")
    return found


def _arguments(call: ast.Call, names: Mapping[str, ast.expr], found: Found, prefix: str) -> dict[str, Any]:
    """The keyword arguments whose values stand in the file; the others go into `found.unknown`."""
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg in (None, "args", "processing_class", "tokenizer", "peft_config", "callbacks"):
            continue
        node = (
            names.get(keyword.value.id, keyword.value)
            if isinstance(keyword.value, ast.Name)
            else keyword.value
        )
        name = f"{prefix}{keyword.arg}".replace("lora_lora_", "lora_")
        try:
            values[name] = ast.literal_eval(node)
        except ValueError:
            known = _reward(keyword, node) if keyword.arg == "reward_funcs" else _dataset(node)
            if known is None:
                found.unknown[name] = ast.unparse(node)
            else:
                values[name] = known
    return values


def _reward(keyword: ast.keyword, node: ast.expr) -> list[str] | None:
    """Functions by their names: they are to be found in the file itself."""
    parts = node.elts if isinstance(node, ast.List) else [keyword.value]
    return [f"FILE:{part.id}" for part in parts if isinstance(part, ast.Name)] or None


def _dataset(node: ast.expr) -> str | None:
    """`load_dataset("OWNER/NAME", "CONFIG", split="train")` as we write it."""
    if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "load_dataset":
        return None
    try:
        place = [ast.literal_eval(part) for part in node.args]
        split = {k.arg: ast.literal_eval(k.value) for k in node.keywords}.get("split", "train")
    except ValueError:
        return None
    return f"{'/'.join(place)}:{split}"


def _method(name: str) -> str:
    plain = name.lower()
    return METHODS.get(plain, plain)


def _method_of(settings: Mapping[str, Any]) -> str:
    """The method that a YAML file of TRL is for, which only its settings tell."""
    if "num_generations" in settings or "max_completion_length" in settings or "epsilon" in settings:
        return "grpo"
    return "dpo" if "beta" in settings or "loss_type" in settings else "grpo"
