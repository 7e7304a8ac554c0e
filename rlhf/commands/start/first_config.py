"""A first config for a model, a dataset and a reward, with sizes that fit them."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf.commands.start.quickstart import quickstart_settings
from rlhf.commands.start.sizes import Sizes, first_sizes, fitting, measured_sizes, positions
from rlhf.commands.start.text import Chosen, config_text
from rlhf.config.load import make_config
from rlhf.config.overrides import load_yaml
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.data.rows import read_rows
from rlhf.preflight.estimate import Estimate
from rlhf.preflight.load import load_inputs
from rlhf.preflight.plan import GIB
from rlhf.small_model import SmallModelError, make_small_model

NUMERIC, EXACT = "rlhf.rewards.builtin:numeric_match", "rlhf.rewards.builtin:exact_match"
EXAMINED = 1000
"""The number of lines that decide which built-in reward fits the column `answer`."""


def first_config(
    file: str, model: str | None, data: str | None, held_out: str | None, reward: str | None
) -> tuple[str, Estimate]:
    """The text of a config, and the memory that its run would take.

    Raises ConfigError or another ValueError as `rlhf check` does for what is wrong with model, data, reward.
    """
    max_completion_tokens: int | None = None
    if data is None:
        settings = quickstart_settings()
        data, held_out = settings["data"]["train"], held_out or settings["data"]["eval"]
        max_completion_tokens = settings["rollout"]["max_completion_tokens"]
    assert data is not None
    if model is None:
        try:
            model = str(make_small_model())
        except SmallModelError as error:
            raise ConfigError(f"{error}; or name a model with --model") from None
    chosen = Chosen(file, model, data, held_out, reward or built_in(data))
    room = positions(model)
    inputs = load_inputs(_config(chosen, first_sizes(room)))
    with closing(inputs.rewards):
        sizes = measured_sizes(model, inputs, room, max_completion_tokens)
        sizes, memory = fitting(sizes, lambda smaller: _config(chosen, smaller), inputs)
    return config_text(chosen, sizes, memory=in_words(memory)), memory


def _config(chosen: Chosen, sizes: Sizes) -> Config:
    return make_config(load_yaml(config_text(chosen, sizes)))


def in_words(memory: Estimate) -> str:
    """The estimated memory of a run, and that of this machine."""
    machine = memory.machine
    return f"{memory.peak / GIB:.2f} GiB, of {machine.memory / GIB:.1f} here ({machine.device})"


def built_in(data: str) -> str:
    """The built-in reward for the column `answer` of a dataset.

    Raises ConfigError: there is no such column.
    """
    rows = list(islice(read_rows(Path(data)), EXAMINED))
    columns = dict.fromkeys(name for row in rows for name in row.columns)
    if "answer" not in columns:
        raise ConfigError(
            f"{data} has no column `answer` that a built-in reward could compare with (it has "
            f"{', '.join(columns)}): name a reward function with --reward FILE.py:FUNCTION; "
            "rlhf init --reward my_reward.py writes an example"
        )
    return NUMERIC if all(_is_number(row.columns.get("answer")) for row in rows) else EXACT


def _is_number(value: Any) -> bool:
    """Whether a value is a number, the text of one, or a text that ends with one behind `####`."""
    if isinstance(value, str):
        value = value.rpartition("####")[2].strip().replace(",", "")
    try:
        return not isinstance(value, bool) and float(value) == float(value)
    except (TypeError, ValueError):
        return False
