"""`rlhf init FILE.yaml`: a first config for a model, a dataset and a reward; `rlhf init --reward FILE.py`: a
first reward function.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from rlhf.commands.start.reward import EXAMPLE
from rlhf.config.section import ConfigError


def add_init(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    command.add_argument("file", nargs="?", metavar="FILE.yaml", help="the config to write")
    command.add_argument(
        "--model", metavar="MODEL", help="a model folder, or a name on the hub (default: the quickstart's)"
    )
    command.add_argument(
        "--data", metavar="PATH", help="prompts to train on (default: the additions of the quickstart)"
    )
    command.add_argument("--eval", metavar="PATH", help="held-out prompts, which training never shows")
    command.add_argument(
        "--reward",
        metavar="FILE.py:FUNCTION",
        help="the reward (default: a built-in one that compares with the column `answer`); without FILE.yaml "
        "a file to write an example of a reward function to: FILE.py",
    )


def run_init(options: argparse.Namespace) -> Iterator[str]:
    """The lines to show. Raises ValueError, with what to do: nothing is written then."""
    if options.file is None:
        return _write_reward(options)
    return _write_config(options)


def _write_reward(options: argparse.Namespace) -> Iterator[str]:
    others = [name for name in ("model", "data", "eval") if getattr(options, name) is not None]
    if others or options.reward is None or not options.reward.endswith(".py"):
        raise ConfigError(
            "name the file to write: rlhf init FILE.yaml for a config, or rlhf init --reward FILE.py for an "
            "example of a reward function"
        )
    _write(options.reward, EXAMPLE.replace("FILE", options.reward))
    yield f"{options.reward} is written; test it: python {options.reward}"
    yield f"then name it in a config: rlhf init FILE.yaml --reward {options.reward}:correct"


def _write_config(options: argparse.Namespace) -> Iterator[str]:
    file: str = options.file
    if Path(file).suffix not in (".yaml", ".yml"):
        raise ConfigError(f"expected a file FILE.yaml to write, got {file}")
    if Path(file).expanduser().exists():
        raise _exists(file)
    if options.reward is not None and ":" not in options.reward:
        raise ConfigError(
            f"expected --reward FILE.py:FUNCTION, got {options.reward}; rlhf init --reward {options.reward} "
            "alone writes an example there, with the function `correct`"
        )
    from rlhf.commands.start.first_config import first_config, in_words

    text, memory = first_config(file, options.model, options.data, options.eval, options.reward)
    _write(file, text)
    yield f"{file} is written; look through it, then: rlhf check {file}, and rlhf train {file}"
    if not memory.fits:
        yield (
            f"warning      it will not fit on this machine: estimated memory {in_words(memory)}; rlhf check "
            f"{file} says what takes it"
        )


def _write(name: str, text: str) -> None:
    """Raises ConfigError: the file exists, or cannot be written."""
    try:
        with Path(name).expanduser().open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise _exists(name) from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be written: {error.strerror}") from None


def _exists(name: str) -> ConfigError:
    return ConfigError(f"{name} exists, and nothing is overwritten: choose another name")
