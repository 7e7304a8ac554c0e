"""The `rlhf` command: train, check, eval, report, export, doctor."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rlhf.config.load import load_task
from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.run import Config

if TYPE_CHECKING:
    from rlhf.reward_model.trainer import RewardModelTrainer
    from rlhf.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: done, or stopped on request with all saved. 2: bad input, the message says what.

    3: another rank has failed; the message names it.
    """
    parser = make_parser()
    options, loose = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one go; those after an option come back here
    unknown = [text for text in loose if text.startswith("-") or "overrides" not in options]
    if unknown:
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}; a setting is key=value, as steps=5, and "
            f"rlhf {options.command} --help has the options"
        )
    if loose:
        options.overrides += loose
    _quiet_libraries()
    if options.command not in ("train", "check"):
        return _say(options)
    try:
        config = load_task(options.config, options.overrides)
        if options.command == "check":
            from rlhf.commands.check import run_check

            for line in run_check(config, ranks=options.ranks, every_setting=options.settings):
                sys.stdout.write(line + "\n")
            return 0
        trainer = _trainer(config)
    except ValueError as error:
        return _refuse(options.command, error)
    return _run(trainer)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlhf", description="Reinforcement learning for language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in (
        ("train", "train as the config says"),
        ("check", "resolve and check everything that can be known before weights are loaded"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("config", help="a YAML file, see configs/")
        if name == "check":
            command.add_argument("--settings", action="store_true", help="show every setting in force too")
            command.add_argument("--ranks", type=int, help="as if on so many, for what each of them needs")
        _add_overrides(command)
    summary = "accuracy and pass@k of a run, a checkpoint or a model on a dataset, with 95%% intervals"
    command = commands.add_parser("eval", help=summary, description=summary)
    command.add_argument("source", help="run folder, checkpoint folder, model folder or hub name")
    command.add_argument("--config", help="settings of a model that is no run: a YAML file, see configs/")
    command.add_argument(
        "--data", help="jsonl or parquet file, or a `datasets` folder; of a run: its data.eval"
    )
    command.add_argument(
        "--reward", action="append", default=[], help="file.py:function, may be repeated; of a run: its own"
    )
    command.add_argument("--k", type=_numbers, default=(), help="of pass@k, as 1,8,64")
    command.add_argument(
        "--greedy", action="store_true", help="one sample, the most probable token each time"
    )
    command.add_argument("--out", help="JSON file for figures and completions; must not exist")
    _add_overrides(command)
    summary = "one HTML page of a run, or one that compares several"
    command = commands.add_parser("report", help=summary, description=summary)
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    command.add_argument("--out", help="of a comparison; comparison.html when not given")
    summary = "write a checkpoint in the Hugging Face layout"
    command = commands.add_parser("export", help=summary, description=summary)
    command.add_argument("source", help="run folder (its newest checkpoint) or checkpoint folder")
    command.add_argument("folder", help="where to; empty, not there yet, or an earlier export")
    command.add_argument(
        "--adapter", action="store_true", help="the LoRA adapter alone instead of merged weights"
    )
    summary = "what is installed, what works here, and what to install for more"
    commands.add_parser("doctor", help=summary, description=summary)
    return parser


def _add_overrides(command: argparse.ArgumentParser) -> None:
    text = "instead of the file's setting"
    command.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole numbers with commas between, got {text!r}") from None


def _say(options: argparse.Namespace) -> int:
    """The commands that print lines, each checked before anything long begins."""
    from rlhf.checkpoints.stateful import CheckpointError
    from rlhf.rewards.workers.pool import RewardError

    try:
        for line in _lines(options):
            sys.stdout.write(line + "\n")
    except (ValueError, CheckpointError, RewardError) as error:
        return _refuse(options.command, error)
    return 0


def _lines(options: argparse.Namespace) -> Iterable[str]:
    match options.command:
        case "eval":
            from rlhf.commands.evaluate import Request, run_evaluation

            return run_evaluation(
                Request(
                    options.source,
                    config=options.config,
                    data=options.data,
                    rewards=tuple(options.reward),
                    k=options.k,
                    greedy=options.greedy,
                    out=options.out,
                    overrides=tuple(options.overrides),
                )
            )
        case "report":
            from rlhf.commands.report import run_report

            return run_report(options.runs, options.out)
        case "export":
            from rlhf.commands.export import run_export

            return run_export(options.source, options.folder, adapter=options.adapter)
        case _:
            from rlhf.commands.doctor import run_doctor

            return run_doctor()


def _trainer(config: Config | RewardModelConfig) -> Trainer | RewardModelTrainer:
    if isinstance(config, RewardModelConfig):
        from rlhf.reward_model.trainer import RewardModelTrainer

        return RewardModelTrainer(config)
    from rlhf.trainer import Trainer

    return Trainer(config)


def _run(trainer: Trainer | RewardModelTrainer) -> int:
    """What a person can mend is said in a sentence; everything else is a bug and keeps its traceback."""
    from rlhf.checkpoints.stateful import CheckpointError
    from rlhf.distributed.watchdog import EXIT, RankError
    from rlhf.models.pretrained import ModelError
    from rlhf.models.vision.images import ImageError
    from rlhf.monitoring.run_folder import RunFolderError
    from rlhf.monitoring.sinks import SinkError
    from rlhf.out_of_memory import memory_advice
    from rlhf.rewards.workers.pool import RewardError
    from rlhf.rollout.engine import EngineError, SyncError

    try:
        trainer.run()
    except (
        CheckpointError,
        EngineError,
        ImageError,
        ModelError,
        RewardError,
        RunFolderError,
        SinkError,
        SyncError,
    ) as error:
        return _refuse("train", error)
    except RankError as error:
        _refuse("train", error)
        return EXIT
    except Exception as error:
        # libraries say that memory is short in errors of many kinds
        advice = memory_advice(error, trainer.place)
        if advice is None:
            raise
        return _refuse("train", ValueError(advice))
    except KeyboardInterrupt:
        sys.stderr.write("rlhf train: stopped at once; what the last checkpoint holds is kept\n")
        return 130
    return 0


def _refuse(command: str, error: Exception) -> int:
    text = "\n  ".join(str(error).splitlines())
    sys.stderr.write(f"rlhf {command}: {text}\n")
    return 2


def _quiet_libraries() -> None:
    """Their progress bars and notices would break up our own display."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
