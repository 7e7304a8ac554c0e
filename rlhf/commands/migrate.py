"""`rlhf migrate FILE`: a config of ours from a script or config of verl or TRL."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from rlhf.config.section import ConfigError
from rlhf.migrate.write import migrated


def add_migrate(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    command.add_argument(
        "source", metavar="FILE", help="a shell script, a YAML file, or Python with GRPOConfig(...)"
    )
    command.add_argument("--out", metavar="FILE", help="the YAML file to write (default: it is printed)")


def run_migrate(options: argparse.Namespace) -> Iterator[str]:
    """The lines of the config, or where it was written. Raises ConfigError: it cannot be made or written."""
    text = migrated(Path(options.source).expanduser())
    if options.out is None:
        yield from text.splitlines()
        return
    file = Path(options.out).expanduser()
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise ConfigError(f"{file} exists; choose another name for --out") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from None
    yield f"{file} is written; look through it, then: rlhf check {file}"
