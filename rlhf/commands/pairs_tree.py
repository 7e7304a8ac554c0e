"""`rlhf pairs tree` and `rlhf pairs order`: they read settings, data and weights of a config."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from rlhf.commands.evaluate import TAKEN, Request, evaluation_config
from rlhf.commands.model_source import Source, load_weights
from rlhf.components import engine_starter
from rlhf.compute_dtype import with_dtype
from rlhf.config.load import load_config
from rlhf.config.run import Config
from rlhf.config.section import ConfigError, masked
from rlhf.config.tree import TreeConfig
from rlhf.inputs import Inputs
from rlhf.models.loading import load_policy
from rlhf.pairs.files import write_pairs
from rlhf.pairs.order import Cuts, answered, check_new, perplexities, write_order
from rlhf.pairs.tree import TreeSearch, in_batches
from rlhf.pairs.tree_judge import SelfEvaluation
from rlhf.preflight.load import load_inputs
from rlhf.types import Prompt


def run_tree(file: str, out: str, overrides: Sequence[str]) -> Iterator[str]:
    """Searches the prompts of `data.train` with the model of a config, and writes pairs; the lines to show.

    Raises ConfigError, ModelError, EngineError, RewardError or PairsError.
    """
    given = load_config(file, overrides)
    settings = given.tree
    # prompts, model and rewards are read as an evaluation reads them, and nothing of training is
    request = Request(given.model.path, config=file, data=given.data.train, overrides=tuple(overrides))
    config = with_dtype(evaluation_config(request, Source(given.model.path, None, None)))
    if settings.evaluator == "self" and settings.gold_column is None:
        raise ConfigError(
            "tree.evaluator: self compares with the right answer: set tree.gold_column to its column"
        )
    inputs = load_inputs(config)
    with closing(inputs.rewards):
        _check(config, settings, inputs)
        yield from _write(config, settings, inputs, Path(out))


def _check(config: Config, settings: TreeConfig, inputs: Inputs) -> None:
    gold = settings.gold_column
    if gold is not None and gold not in inputs.train.columns:
        raise ConfigError(
            f"tree.gold_column: {config.data.train} has no column {gold!r}, it has "
            f"{', '.join(inputs.train.columns) or 'none beside the prompt'}"
        )
    if with_images := next((p for p in inputs.train.prompts if p.images), None):
        raise ConfigError(
            f"{config.data.train}, {with_images.id}: has images, and the pairs of rlhf pairs tree are text: "
            "give prompts without images"
        )


def _write(config: Config, settings: TreeConfig, inputs: Inputs, folder: Path) -> Iterator[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = load_weights(Source(config.model.path, None, None), config.model, device, seed=config.seed)
    prompts = inputs.train.prompts[: settings.prompts]
    engine = engine_starter(config, inputs, weights.model)()
    engine.update_weights(weights, version=0)
    judge = None
    if settings.evaluator == "self":
        judge = SelfEvaluation(weights.model, inputs.tokenizer, settings.gold_column or "")
    search = TreeSearch.of(config, settings, inputs, engine, judge)
    make = in_batches(search.search, prompts, config.rollout.prompts_per_step)
    try:
        known = {**_known(config, settings), "prompts": _digest(prompts), "weights": weights.digest()}
        yield from write_pairs(folder, known, len(prompts), make, label="searching").lines(folder)
    finally:
        engine.close()
        if inputs.environments is not None:
            inputs.environments.close()


def _known(config: Config, settings: TreeConfig) -> dict[str, Any]:
    """All settings that the pairs depend on, secrets masked."""
    taken: set[str] = {*TAKEN, "seed"} - {"eval"}
    dumped = config.model_dump(mode="json", include=taken)
    return {**masked(dumped), "tree": settings.model_dump(mode="json")}


def _digest(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(repr([(p.id, p.token_ids, dict(p.columns)) for p in prompts]).encode()).hexdigest()


def run_order(file: str, out: str, overrides: Sequence[str], cuts: Cuts) -> Iterator[str]:
    """Writes the lines of `data.train` from easy to hard; the lines to show.

    Raises ConfigError, ModelError or PairsError.
    """
    check_new(Path(out))
    config = with_dtype(load_config(file, overrides))
    if config.data.mode == "online":
        raise ConfigError(
            f"{file} samples completions, and rlhf pairs order takes those of the data: set "
            "data.mode=offline, and data.train to a file with a column `completion`"
        )
    inputs = load_inputs(config)
    with closing(inputs.rewards):
        assert inputs.offline is not None
        lines = answered(inputs.offline)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(config.model, config.model.path, device, inputs.processor, longest=config.longest)
    values = list(perplexities(lines, policy, device, config.learner.microbatch_tokens))
    yield from write_order(Path(out), lines, values, cuts)
    if inputs.offline.skipped:
        yield f"left out      {inputs.offline.skipped} lines that are too long"
    yield f"written       {out}"
