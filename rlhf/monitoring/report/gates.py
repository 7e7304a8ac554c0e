"""The figure of a gated reward model: how much each objective counted for each prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from rlhf.monitoring.report import plots

SHOWN = 16
"""Prompts of a figure: the last that were recorded."""
WIDTH = 40
"""Characters of a prompt."""


def gates(groups: Sequence[Mapping[str, Any]]) -> str:
    """A figure for each reward function that logged the weights of its gate; empty without any.

    `groups`: those in RUN/samples.jsonl, oldest first. A prompt has the weights of its last group; the gate
    sees the prompt alone, so that all of its completions have the same.
    """
    found: dict[str, dict[str, Mapping[str, float]]] = {}
    for group in groups:
        for key, value in group["completions"][0].get("logged", {}).items():
            function, _, column = key.rpartition("/")
            if column == "gate" and (weights := _weights(value)):
                of_one = found.setdefault(function, {})
                prompt = _short(group["prompt"])
                of_one.pop(prompt, None)
                of_one[prompt] = weights
    drawn = "".join(_figure(function, of_one) for function, of_one in found.items())
    return f'<h2>Weights of the objectives, by prompt</h2><div class="plots">{drawn}</div>' if drawn else ""


def _figure(function: str, weights: Mapping[str, Mapping[str, float]]) -> str:
    rows = list(weights)[-SHOWN:]
    names = dict.fromkeys(name for row in rows for name in weights[row])
    parts = [(name, [weights[row].get(name, 0.0) for row in rows]) for name in names]
    return plots.shares(f"Gate of {function}: the last {len(rows)} prompts that were recorded", rows, parts)


def _weights(value: object) -> Mapping[str, float]:
    """The weights of objectives; empty for anything else, which a user's function may log as its gate."""
    if not isinstance(value, dict):
        return {}
    given = cast(Mapping[str, object], value)
    weights = {name: float(w) for name, w in given.items() if isinstance(w, int | float)}
    return weights if len(weights) == len(given) else {}


def _short(prompt: Any) -> str:
    """The end of a prompt: of a chat, of its last message."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    line = " ".join(text.split()).replace("$", "")
    return line if len(line) <= WIDTH else f"…{line[1 - WIDTH :]}"
