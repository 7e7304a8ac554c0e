"""`rlhf pairs bdhs`: loads the model and the answers that pairs are made from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf.commands.model_source import Source, find_source, load_weights
from rlhf.commands.paths import taken_settings
from rlhf.compute_dtype import with_dtype
from rlhf.config.load import make_config
from rlhf.config.overrides import read_settings
from rlhf.config.run import Config
from rlhf.config.section import ConfigError
from rlhf.data.identity import digest
from rlhf.inputs import Inputs
from rlhf.models.vision.embeddings import Vision
from rlhf.pairs.bdhs import BlindWriter, Hallucinator, Hiding
from rlhf.pairs.files import PairsError, write_pairs
from rlhf.pairs.similarity import load_similarity
from rlhf.preflight.load import load_inputs
from rlhf.rollout.factory import make_engine

TAKEN = ("model", "data", "rollout")
"""The sections of a config that count here."""
SAMPLING = ("max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "stop_token_ids")


@dataclass(frozen=True, slots=True)
class Asked:
    """The arguments of the command that are not about hiding."""

    source: str
    data: str | None
    seed: int
    similarity: str
    overrides: tuple[str, ...] = ()


def run_bdhs(asked: Asked, hiding: Hiding, folder: Path) -> Iterator[str]:
    """The lines to show. Raises ConfigError, ModelError, CheckpointError, EngineError or PairsError."""
    similarity = load_similarity(asked.similarity)
    source, config = _settings(asked)
    inputs = load_inputs(config)
    with closing(inputs.rewards):
        assert inputs.offline is not None
        golds = inputs.offline.groups
        if inputs.processor is None or not any(group.prompt.images for group in golds):
            what = f"no prompt of {config.data.train} has an image"
            if inputs.processor is None:
                what = f"{config.model.path} takes no images"
            raise PairsError(f"pairs are made by hiding images, but {what}")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        weights = load_weights(source, config.model, device, seed=asked.seed)
        engine = make_engine(
            "hf",
            weights.model,
            eos_token_ids=inputs.eos_token_ids,
            image_inputs=Vision(weights.model, inputs.processor),
        )
        writer = BlindWriter(weights.model, engine, inputs, config.rollout)
        maker = Hallucinator(golds, writer, similarity, hiding, asked.seed)
        settings = {
            **maker.settings(),
            "similarity": asked.similarity,
            "model": config.model.path,
            "weights": weights.digest(),
            "data": digest([group.prompt for group in golds], golds),
            "sampling": config.rollout.model_dump(mode="json", include=set(SAMPLING)),
        }
        summary = write_pairs(folder, settings, len(golds), maker.make, label="writing with hidden images")
        yield f"model        {source.checkpoint or source.name}"
        yield from _about(inputs)
        yield from summary.lines(folder)


def _about(inputs: Inputs) -> Iterator[str]:
    assert inputs.offline is not None
    yield f"data         {inputs.offline.source}: {len(inputs.offline.groups)} prompts with answers"
    if inputs.offline.skipped:
        yield f"left out     {inputs.offline.skipped} lines that are too long"


def _settings(asked: Asked) -> tuple[Source, Config]:
    """What is written with, and the settings: those of a config or a run, with what was asked in their place.

    Raises ConfigError: there is no data.
    """
    is_config = asked.source.endswith((".yaml", ".yml"))
    source = None if is_config else find_source(asked.source)
    file = asked.source if source is None else source.config
    own = {} if file is None else read_settings(file)
    folder = None if source is None else source.folder
    tree = taken_settings(own, folder, TAKEN, asked.overrides)
    if source is not None and source.checkpoint is None:
        tree["model"]["path"] = source.name
    if asked.data is not None:
        tree["data"]["train"] = asked.data
    if not tree["data"].get("train"):
        raise ConfigError("there are no answers to make pairs from: add --data FILE, or data.train=FILE")
    for key in ("eval", "precompute_reference", "together_column"):
        tree["data"].pop(key, None)
    rollout = {key: tree["rollout"][key] for key in SAMPLING if key in tree["rollout"]}
    longest = int(tree["data"].get("max_prompt_tokens", 1024)) + int(
        rollout.get("max_completion_tokens", 512)
    )
    config = make_config(
        tree
        | {
            "rollout": rollout,
            "data": tree["data"] | {"mode": "offline"},
            "run_dir": ".",
            "steps": 1,
            "seed": asked.seed,
            "algorithm": {"name": "sft"},
            "learner": {"microbatch_tokens": longest},
            "monitor": {"sinks": []},
        }
    )
    return source or find_source(config.model.path), with_dtype(config)
