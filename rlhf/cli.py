"""The `rlhf` command line: options of each command, exit status."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rlhf.commands.migrate import add_migrate, run_migrate
from rlhf.commands.pairs import add_pairs, run_pairs
from rlhf.commands.start.init import add_init, run_init
from rlhf.commands.start.quickstart import quickstart_config
from rlhf.config.load import load_task
from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.run import Config
from rlhf.files import drop_unwritten, printable

if TYPE_CHECKING:
    from rlhf.reward_model.trainer import RewardModelTrainer
    from rlhf.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    0: done, or stopped on request with everything saved. 2: bad input or a failure that the user can mend;
    the message says what to do. 3: another rank has failed; the message names it. 130: stopped at once by a
    second signal.
    """
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one piece; overrides that stand after an option are left over
    unknown = [text for text in rest if text.startswith("-") or "overrides" not in options]
    if unknown:
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}; a setting is key=value, as steps=5, and "
            f"rlhf {options.command} --help has the options"
        )
    if rest:
        options.overrides += rest
    _quiet_libraries()
    try:
        return _run_command(options)
    except BrokenPipeError:
        # whoever reads the output has seen enough, as `head`; training itself never gets here
        return 0
    except KeyboardInterrupt:
        # a second Ctrl-C, or one before training has begun: nothing is saved now
        _complain(f"rlhf {options.command}: stopped at once; what was saved before is kept")
        return 130
    finally:
        for stream in (sys.stdout, sys.stderr):
            drop_unwritten(stream)


def _run_command(options: argparse.Namespace) -> int:
    if options.command not in ("train", "check", "quickstart"):
        return _print_lines(options)
    try:
        if options.command == "quickstart":
            config = quickstart_config(options.overrides)
        elif options.config is None:
            raise ValueError("name the file with the settings, as mine.yaml; rlhf init mine.yaml writes one")
        else:
            config = load_task(options.config, options.overrides)
        if options.command == "check":
            from rlhf.commands.check import run_check

            for line in run_check(config, ranks=options.ranks, every_setting=options.settings):
                sys.stdout.write(line + "\n")
            return 0
        trainer = _trainer(config)
    except ValueError as error:
        return _refuse(options.command, error)
    return _run(trainer, options.command)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlhf",
        description="Tandem: reinforcement learning for language models. A YAML file describes a run: "
        "`rlhf init FILE` writes a first one, `rlhf train FILE` trains it and fills its run folder.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    summary = (
        "train a small model on additions, three to six minutes on two CPU cores: writes runs/quickstart"
    )
    command = commands.add_parser("quickstart", help=summary, description=_sentence(summary))
    _add_overrides(command)
    summary = "train as a config says, from the start or (checkpoint.resume=auto) from the last checkpoint"
    _add_config(commands.add_parser("train", help=summary, description=_sentence(summary)))
    summary = "check a config and its data, and show what the run will do, without loading weights"
    command = commands.add_parser("check", help=summary, description=_sentence(summary))
    command.add_argument("--settings", action="store_true", help="also show the value of every setting")
    command.add_argument(
        "--ranks", type=int, metavar="N", help="show memory and time for N ranks instead of those of this run"
    )
    _add_config(command)
    summary = "measure accuracy and pass@k of a run, a checkpoint or a model on a dataset"
    details = ", with 95% intervals; data and rewards are those of the run unless options name others"
    _add_eval(commands.add_parser("eval", help=summary, description=_sentence(summary + details)))
    summary = "write an HTML page about one run (RUN/report.html), or one that compares several runs"
    command = commands.add_parser("report", help=summary, description=_sentence(summary))
    command.add_argument("runs", nargs="+", metavar="RUN", help="a run folder; several are compared")
    command.add_argument(
        "--out", metavar="FILE", help="the HTML file of a comparison (default: comparison.html)"
    )
    _add_models(commands)
    summary = "write a first config for a model, data and a reward, or an example of a reward function"
    add_init(commands.add_parser("init", help=summary, description=_sentence(summary)))
    summary = "turn a script or config of verl or TRL into a config, with a line for what has no counterpart"
    add_migrate(commands.add_parser("migrate", help=summary, description=_sentence(summary)))
    summary = "make preference pairs and write them as a dataset"
    add_pairs(commands.add_parser("pairs", help=summary, description=_sentence(summary)))
    summary = "show what is installed, what works on this machine, and what to install for more"
    commands.add_parser("doctor", help=summary, description=_sentence(summary))
    return parser


def _add_models(commands: Any) -> None:
    """What writes models: export and combine."""
    summary = "write the model of a checkpoint in the Hugging Face layout"
    command: argparse.ArgumentParser = commands.add_parser(
        "export", help=summary, description=_sentence(summary)
    )
    command.add_argument("source", help="a run folder (its newest checkpoint is used) or a checkpoint folder")
    command.add_argument("folder", help="the folder to write: new, empty, or an earlier export")
    command.add_argument(
        "--adapter", action="store_true", help="write the LoRA adapter alone instead of merged weights"
    )
    summary = "add LoRA adapters of one model up, each times its weight, exactly"
    command = commands.add_parser("combine", help=summary, description=_sentence(summary))
    command.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER=WEIGHT",
        help="a run folder or an adapter folder, as runs/a=0.5",
    )
    command.add_argument(
        "--out", metavar="FOLDER", required=True, help="the folder to write: new, empty, or an earlier export"
    )
    command.add_argument("--merged", action="store_true", help="write the model with the sum in its weights")


def _add_eval(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source", help="a run folder, a checkpoint folder, a model folder, or a model on the Hugging Face hub"
    )
    command.add_argument(
        "--config", metavar="FILE", help="YAML file with the settings for a model that has no run folder"
    )
    command.add_argument(
        "--data",
        metavar="PATH",
        help="jsonl or parquet file, or a `datasets` folder (default: data.eval of the config)",
    )
    command.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="FILE.py:FUNCTION",
        help="the reward function; may be repeated (default: reward.functions of the config)",
    )
    command.add_argument(
        "--k",
        type=_numbers,
        default=(),
        metavar="K,K,...",
        help="the k of pass@k, as 1,8,64 (default: powers of two up to eval.samples)",
    )
    command.add_argument(
        "--greedy", action="store_true", help="decode greedily: one sample of each prompt, temperature 0"
    )
    _add_conversations(command)
    command.add_argument(
        "--out", metavar="FILE", help="JSON file to write results and completions to; must not exist yet"
    )
    _add_overrides(command)


def _add_conversations(command: argparse.ArgumentParser) -> None:
    """Options of eval for conversations: goals and revisions."""
    command.add_argument(
        "--goals",
        metavar="JUDGE",
        help="judge whether the users' goals were reached (GSR, RCOF): FILE.py:JUDGE, or a chat endpoint as "
        "'{url: ..., model: ..., votes: 3, temperature: 0.7}'",
    )
    command.add_argument(
        "--revise",
        type=int,
        default=0,
        metavar="N",
        help="have the model improve its answers N times (data.improve_prompt), and score each round",
    )
    command.add_argument(
        "--revise-while",
        metavar="OBJECTIVE",
        help="keep a revision only where this objective is above 0 (the gap of a reward_model), and improve "
        "no further where it is not",
    )


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", nargs="?", help="a YAML file with the settings; rlhf init FILE writes one")
    _add_overrides(command)


def _sentence(summary: str) -> str:
    """A summary as the description of its command."""
    return f"{summary[0].upper()}{summary[1:]}."


def _add_overrides(command: argparse.ArgumentParser) -> None:
    text = "settings that replace those of the config, as steps=5 or learner.lr=1e-6 (docs/settings.md)"
    command.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers separated by commas, as 1,8,64, got {text!r}"
        ) from None


def _print_lines(options: argparse.Namespace) -> int:
    """Runs a command that does not train and prints its lines. Returns the exit status."""
    from rlhf.checkpoints.stateful import CheckpointError
    from rlhf.rewards.workers.pool import RewardError

    try:
        for line in _lines(options):
            sys.stdout.write(printable(line) + "\n")
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
                    goals=options.goals,
                    revise=options.revise,
                    revise_while=options.revise_while,
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
        case "combine":
            from rlhf.commands.combine import run_combine

            return run_combine(options.adapters, options.out, merged=options.merged)
        case "init":
            return run_init(options)
        case "migrate":
            return run_migrate(options)
        case "pairs":
            return run_pairs(options)
        case _:
            from rlhf.commands.doctor import run_doctor

            return run_doctor()


def _trainer(config: Config | RewardModelConfig) -> Trainer | RewardModelTrainer:
    if isinstance(config, RewardModelConfig):
        from rlhf.reward_model.trainer import RewardModelTrainer

        return RewardModelTrainer(config)
    from rlhf.trainer import Trainer

    return Trainer(config)


def _run(trainer: Trainer | RewardModelTrainer, command: str) -> int:
    """Trains and returns the exit status.

    Errors that the user can mend become a message; any other error is a bug and keeps its traceback.
    """
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
        return _refuse(command, error)
    except RankError as error:
        _refuse(command, error)
        return EXIT
    except Exception as error:
        # libraries report a lack of memory by many types of errors
        advice = memory_advice(error, trainer.place)
        if advice is None:
            raise
        return _refuse(command, ValueError(advice))
    return 0


def _refuse(command: str, error: Exception) -> int:
    text = "\n  ".join(str(error).splitlines())
    _complain(f"rlhf {command}: {text}")
    return 2


def _complain(text: str) -> None:
    """Writes a line to stderr, where that is still there: the exit status says the rest."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{printable(text)}\n")


def _quiet_libraries() -> None:
    """Progress bars and notices of libraries would break up the display of the run."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
