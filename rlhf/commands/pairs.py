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
    _add_tree(kinds)
    _add_order(kinds)


def run_pairs(options: argparse.Namespace) -> Iterator[str]:
    """The lines to show. Raises ValueError, with what to do."""
    match options.kind:
        case "bdhs":
            return _bdhs(options)
        case "tree":
            from rlhf.commands.pairs_tree import run_tree

            return run_tree(options.config, options.out, options.overrides)
        case "order":
            from rlhf.commands.pairs_tree import run_order
            from rlhf.pairs.order import Cuts

            cuts = Cuts(options.parts, options.share, options.call)
            return run_order(options.config, options.out, options.overrides, cuts)
        case _:
            return _counter(options)


def _add(kinds: Any, name: str, summary: str, *, has_config: bool = False) -> argparse.ArgumentParser:
    """A subcommand; its seed is an option, or with a config that of the config."""
    command: argparse.ArgumentParser = kinds.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
    )
    command.add_argument(
        "--out",
        metavar="FOLDER",
        required=True,
        help="the folder to write: new, empty, or one to go on with that this command was killed in",
    )
    if has_config:
        command.add_argument("config", help="a YAML file with the model and the data")
        text = "settings that replace those of the config, as tree.depth=2 (docs/settings.md)"
        command.add_argument("overrides", nargs="*", metavar="key=value", help=text)
    else:
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


def _add_tree(kinds: Any) -> None:
    summary = "search trees of next steps, by the rewards of a config, and pair the best step with the worst"
    _add(kinds, "tree", summary, has_config=True)


def _add_order(kinds: Any) -> None:
    summary = "write a dataset of answers from easy to hard, by their perplexity"
    command = _add(kinds, "order", summary, has_config=True)
    command.add_argument(
        "--parts", type=int, default=3, metavar="N", help="files, one easier than the next (default: 3)"
    )
    command.add_argument(
        "--share",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="share of the answers of each kind that hard.jsonl has (default: 0.3)",
    )
    command.add_argument(
        "--call",
        default=")",
        metavar="TEXT",
        help="text that answers with a call have: they are one kind, the others another (default: a closing "
        "parenthesis)",
    )


def _counter(options: argparse.Namespace) -> Iterator[str]:
    from rlhf.pairs.counter import KINDS, Counter
    from rlhf.pairs.files import write_pairs

    counter, folder = Counter(options.seed, options.kinds or KINDS, options.size), Path(options.out)
    settings = {**counter.settings(), "scenes": options.scenes}
    yield from write_pairs(folder, settings, options.scenes, counter.make, label="drawing").lines(folder)
