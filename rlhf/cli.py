"""The `rlhf` command: `rlhf train CONFIG [key=value ...]`, `rlhf check CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.config import Config
from rlhf.distributed import world_size
from rlhf.reward_model_config import RewardModelConfig
from rlhf.tasks import load_task

if TYPE_CHECKING:
    from rlhf.reward_model_trainer import RewardModelTrainer
    from rlhf.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: done, or stopped on request with all saved. 2: bad input, the message says what."""
    parser = argparse.ArgumentParser(prog="rlhf", description="Reinforcement learning for language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in (
        ("train", "train as the config says"),
        ("check", "resolve and check everything that can be known before weights are loaded"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("config", help="a YAML file, see configs/")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="instead of the file's setting"
        )
    options = parser.parse_args(arguments)
    _quiet_libraries()
    try:
        config = load_task(options.config, options.overrides)
        if options.command == "check":
            _check(config)
            return 0
        trainer = _trainer(config)
    except ValueError as error:
        return _refuse(options.command, error)
    return _run(trainer)


def _check(config: Config | RewardModelConfig) -> None:
    if isinstance(config, RewardModelConfig):
        from rlhf.reward_model_trainer import RewardModelTrainer
        from rlhf.reward_model_trainer import describe as describe_reward_model

        for line in describe_reward_model(RewardModelTrainer(config)):
            sys.stdout.write(line + "\n")
        return
    from rlhf.preflight import describe, load_inputs

    ranks = world_size()
    inputs = load_inputs(config, world_size=ranks)
    for line in describe(config, inputs, world_size=ranks):
        sys.stdout.write(line + "\n")


def _trainer(config: Config | RewardModelConfig) -> Trainer | RewardModelTrainer:
    if isinstance(config, RewardModelConfig):
        from rlhf.reward_model_trainer import RewardModelTrainer

        return RewardModelTrainer(config)
    from rlhf.trainer import Trainer

    return Trainer(config)


def _run(trainer: Trainer | RewardModelTrainer) -> int:
    """What a person can mend is said in a sentence; everything else is a bug and keeps its traceback."""
    from rlhf.checkpoint import CheckpointError
    from rlhf.pretrained import ModelError
    from rlhf.rewards import RewardError
    from rlhf.rollout.engine import EngineError
    from rlhf.run_folder import RunFolderError
    from rlhf.weights import SyncError

    try:
        trainer.run()
    except (CheckpointError, EngineError, ModelError, RewardError, RunFolderError, SyncError) as error:
        return _refuse("train", error)
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
