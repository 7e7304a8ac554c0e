"""`rlhf quickstart`: the run of configs/quickstart.yaml, from any folder and without a clone.

Config and data ship with the package. In the repository rlhf/quickstart/ holds links to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rlhf.config.load import make_config
from rlhf.config.overrides import apply_override, read_settings
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.small_model import SmallModelError, make_small_model

SHIPPED = Path(__file__).parents[2] / "quickstart"
"""The folder with the config and the data of the quickstart."""


def quickstart_settings() -> dict[str, Any]:
    """The settings of the quickstart, with the data where it is on this machine and without a model."""
    settings = read_settings(SHIPPED / "config.yaml")
    data = cast(dict[str, Any], settings["data"])
    for side in ("train", "eval"):
        data[side] = str((SHIPPED / f"{side}.jsonl").resolve())
    del settings["model"]
    return settings


def quickstart_config(overrides: Sequence[str]) -> Config:
    """The config of the run, with the small model, which the first call makes, unless an override names one.

    Raises ConfigError: the package with the small model is missing, or an override is wrong.
    """
    settings = quickstart_settings()
    for override in overrides:
        apply_override(settings, override)
    model = settings.setdefault("model", {})
    if isinstance(model, dict) and "path" not in model:
        try:
            cast(dict[str, Any], model)["path"] = str(make_small_model())
        except SmallModelError as error:
            raise ConfigError(str(error)) from None
    return make_config(settings)
