"""`RewardModelTrainer`, the task that trains a reward model; also what `rlhf check` says of such a run.

rlhf/loop.py runs the steps, saves and resumes. Beside what every run writes, this one writes:

    RUN/model             a sequence classifier in the Hugging Face layout, with its tokenizer
    RUN/calibration.json  for each evaluation: accuracy, calibration error, predicted and observed shares
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig

from rlhf.checkpoints import store
from rlhf.checkpoints.stateful import Stateful
from rlhf.compute_dtype import in_words
from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.section import ConfigError
from rlhf.data.identity import digest
from rlhf.data.pairs import Example, load_examples
from rlhf.devices import this_device
from rlhf.distributed.world import World, world_size
from rlhf.files import write_atomically
from rlhf.loop import Loop
from rlhf.metrics import Max, Metrics
from rlhf.models.classifier import check_can_be_saved
from rlhf.models.loading import load_policy, load_sharded_policy
from rlhf.models.pretrained import (
    check_writes_text,
    load_model_config,
    load_tokenizer,
    pad_token_of,
    text_settings,
    trust,
)
from rlhf.models.sharding import Sharding, gathered, shard_ranks
from rlhf.models.vision.processor import Reader, load_processor
from rlhf.monitoring.monitor import Monitor
from rlhf.preflight.models import check_policy, check_trainable
from rlhf.preflight.tokens import check_tokens
from rlhf.reward_model.evaluation import evaluate
from rlhf.reward_model.kinds.table import kind_of
from rlhf.reward_model.learner import next_batch


class RewardModelTrainer(Loop[RewardModelConfig]):
    """One run of a reward model. `RewardModelTrainer(config).run()` is what `rlhf train` calls."""

    throughput: ClassVar[tuple[str, str]] = ("throughput/examples_per_second", "reward_model/examples")

    def __init__(self, config: RewardModelConfig) -> None:
        """Reads and checks everything except weights. Raises ValueError for bad input."""
        super().__init__(config, timeout=config.distributed.timeout)
        path = config.model.path
        if config.model.trust_remote_code:
            trust(path)
        model = load_model_config(path)
        check_writes_text(path, model)
        check_can_be_saved(path, model)
        check_trainable(config.model, model)
        self.tokenizer = load_tokenizer(path)
        self.processor = load_processor(path, self.tokenizer)
        self.pad_token_id = pad_token_of(self.tokenizer)
        self.kind = kind_of(config)
        self.train, self.held_out = (
            load_examples(path, config.data, self.kind, self.tokenizer, self.processor)
            for path in (config.data.train, config.data.eval)
        )
        if config.batch.low < world_size():
            raise ConfigError(
                f"batch.low is {config.batch.low}, fewer than the {world_size()} ranks that share a batch"
            )
        self.first = self.kind.first(self.tokenizer, self.processor)
        examples = [*self.train, *self.held_out, *self.first]
        _check_lengths(path, model, examples)
        found = ((e.prompt.id, (*e.prompt.token_ids, *chain(*e.completions))) for e in examples)
        check_tokens(path, model, self.tokenizer, found)
        sharded = config.distributed.mode == "sharded" and world_size() > 1
        if sharded:
            shard_ranks(config.distributed, world_size())
        check_policy(config.model, path, None, sharded=sharded)
        _check_images(config, examples)

    def build(self, world: World, monitor: Monitor) -> dict[str, Stateful]:
        # with the compute type that was chosen for this machine
        config = self.kind.config = self.config
        sharding = Sharding.of(config.distributed, getattr(torch, config.model.dtype), world)
        path = config.model.path
        if sharding is None:
            policy = load_policy(config.model, path, world.device, self.processor)
        else:
            policy = load_sharded_policy(config.model, path, sharding, trains=self.kind.trains_model)
        self.learner = self.kind.learner(policy, world, self.first)
        for line in self.learner.told():
            monitor.note(line)
        self.cursor.data = digest([e.prompt for e in self.train])
        return {"cursor": self.cursor, "model": self.learner.optimizer}

    def step(self) -> Metrics:
        """One update."""
        self.agree_to_stop()
        self.monitor.phase("learn")
        batch = next_batch(self.train, self.config, self.cursor.position)
        learned = self.learner.update(batch, step=self.cursor.steps_done)
        self.cursor.position += len(batch)
        self.cursor.steps_done += 1
        metrics = self.world.merge(learned)
        return metrics | {"reward_model/examples": Max(float(len(batch)))}

    def evaluate(self) -> float:
        """The accuracy on the held-out examples."""
        with self.monitor.phase("eval"):
            scores = self.learner.scores(self.held_out)
            record, details = evaluate(self.kind, scores, self.held_out, self.cursor.steps_done)
        if self.world.is_main:
            self._record(record, details)
        return record["accuracy"]

    def _record(self, record: dict[str, Any], details: dict[str, Any]) -> None:
        self.monitor.evaluated(record)
        path = self.folder.path / "calibration.json"
        known: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
        known = [entry for entry in known if entry["step"] < details["step"]]
        write_atomically(path, json.dumps([*known, details], indent=1))
        self.monitor.note(", ".join(_sentences(details)))

    def finish(self) -> None:
        exports, policy = self.config.checkpoint.export, self.learner.model.policy
        if not self.world.is_main:
            # a sharded model is gathered by all ranks together
            for _ in gathered(policy.model) if exports else ():
                pass
            return
        if exports:
            target = self.folder.path / "model"
            reader = Reader(self.config.model.path, self.tokenizer)
            store.export(self.learner.export(self.pad_token_id), reader, target)
            self.monitor.note(f"the reward model is in {target}")
        self.monitor.close()


def _check_lengths(path: str, model: PretrainedConfig, examples: Sequence[Example]) -> None:
    """Raises ConfigError when an example does not fit the model."""
    limit = text_settings(model).get("max_position_embeddings")
    if limit is None:
        return
    for example in examples:
        # a score is read from the state that would predict one more token
        longest = len(example.prompt.token_ids) + max(map(len, example.completions)) + 1
        if longest > limit:
            raise ConfigError(
                f"{example.prompt.id}: prompt and completion need {longest} positions, but {path} has "
                f"{limit}: lower data.max_prompt_tokens or data.max_completion_tokens, with "
                "data.long_prompts=skip"
            )


def _check_images(config: RewardModelConfig, examples: Sequence[Example]) -> None:
    """Raises ConfigError when prompts have images and the model is sharded."""
    if config.distributed.mode == "sharded" and any(e.prompt.images for e in examples):
        raise ConfigError(
            "prompts have images, and models that take images cannot be sharded: set "
            "distributed.mode=replicated"
        )


def describe(trainer: RewardModelTrainer) -> Iterator[str]:
    """What a run of this config will do: the lines that `rlhf check` prints."""
    config = trainer.config
    dtype = in_words(config.model.dtype, this_device())
    yield f"model        {config.model.path}, computes in {dtype}"
    yield f"scores       {', '.join(config.score.objectives)}, from {config.score.kind}"
    yield f"data         {len(trainer.train)} examples, {len(trainer.held_out)} held out"
    if trainer.first:
        yield f"fitted to    {len(trainer.first)} rated completions, before the first step"
    yield from trainer.kind.told(trainer.train)
    if count := sum(len(e.prompt.images or ()) for e in (*trainer.train, *trainer.held_out)):
        yield f"images       {count}, read by the model's own processor"
    batch = config.batch
    yield f"an update    {batch.low} to {batch.high} examples of about {batch.tokens} tokens"
    yield f"the run      {config.steps} steps, learning rate {config.learner.lr:g}"
    yield f"run folder   {config.run_dir}"


def _sentences(details: dict[str, Any]) -> Iterator[str]:
    for name, found in details["objectives"].items():
        yield f"{name}: calibration error {found['calibration_error']:.3f}"
