"""`rlhf pairs`: makes preference pairs and writes them as a dataset; a subcommand for each way."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def add_pairs(command: argparse.ArgumentParser) -> None:
    """Adds the subcommands and their options."""
    kinds: Any = command.add_subparsers(dest="kind", required=True)
    _add_counter(kinds)
    _add_bdhs(kinds)


def run_pairs(options: argparse.Namespace) -> Iterator[str]:
    """The lines to show. Raises ValueError, with what to do."""
    match options.kind:
        case "bdhs":
            return _bdhs(options)
        case _:
            return _counter(options)


def _add(kinds: Any, name: str, summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = kinds.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
    )
    command.add_argument(
        "--out",
        metavar="FOLDER",
        required=True,
        help="the folder to write: new, empty, or one to go on with that this command was killed in",
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="whole number (default: 0)")
    return command


def _add_counter(kinds: Any) -> None:
    command = _add(kinds, "counter", "draw scenes and their counterfactuals, which differ in one word")
    command.add_argument(
        "--scenes", type=int, default=256, metavar="N", help="two pairs are made of each (default: 256)"
    )
    command.add_argument("--kinds", nargs="+", metavar="KIND", help="of left/right, above/below, count (all)")
    command.add_argument(
        "--size", type=int, default=64, metavar="PIXELS", help="a side of the pictures (default: 64)"
    )


def _add_bdhs(kinds: Any) -> None:
    command = _add(
        kinds,
        "bdhs",
        "have a model that sees less of its images write what is rejected; answers of data are chosen",
    )
    command.add_argument(
        "source",
        help="a config (FILE.yaml), or a run folder, a checkpoint, a model folder or a model on the hub",
    )
    command.add_argument(
        "--data", metavar="PATH", help="prompts with images, and answers to them (default: data.train)"
    )
    command.add_argument(
        "--rho", type=float, default=0.99, metavar="SHARE", help="of image tokens hidden (default: 0.99)"
    )
    command.add_argument(
        "--threshold",
        type=float,
        default=0.97,
        metavar="COSINE",
        help="answers at least as similar to the data's are tried again (default: 0.97)",
    )
    command.add_argument("--tries", type=int, default=5, metavar="N", help="most tries a pair (default: 5)")
    command.add_argument(
        "--similarity",
        default="ngrams",
        metavar="FILE.py:EMBED",
        help="a function from texts to vectors (default: n-grams, which see the wording alone)",
    )
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, as rollout.temperature=0.7"
    )


def _bdhs(options: argparse.Namespace) -> Iterator[str]:
    from rlhf.commands.pairs_bdhs import Asked, run_bdhs
    from rlhf.pairs.bdhs import Hiding

    hiding = Hiding(options.rho, options.threshold, options.tries)
    asked = Asked(options.source, options.data, options.seed, options.similarity, tuple(options.overrides))
    return run_bdhs(asked, hiding, Path(options.out))


def _counter(options: argparse.Namespace) -> Iterator[str]:
    from rlhf.pairs.counter import KINDS, Counter
    from rlhf.pairs.files import write_pairs

    counter, folder = Counter(options.seed, options.kinds or KINDS, options.size), Path(options.out)
    settings = {**counter.settings(), "scenes": options.scenes}
    yield from write_pairs(folder, settings, options.scenes, counter.make, label="drawing").lines(folder)
