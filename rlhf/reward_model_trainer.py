"""The run of a reward model: batches, updates, evaluations, checkpoints; the model saved for others to use.

RUN/model           sequence classifier of the Hugging Face layout, with the tokenizer
RUN/calibration.json  one object an evaluation: accuracy, calibration error, and what was predicted and came
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rlhf import checkpoint
from rlhf.distributed import world, world_size
from rlhf.files import write_atomically
from rlhf.interrupt import Interrupt, Interrupted
from rlhf.metrics import Max, Mean, Metrics
from rlhf.optimizer import MasterAdamW
from rlhf.policy import Policy
from rlhf.pretrained import load_tokenizer, pad_token_of
from rlhf.recording import recording
from rlhf.reward_model import RewardModel, RewardModelLearner, next_batch
from rlhf.reward_model_config import RewardModelConfig
from rlhf.reward_model_data import load_examples
from rlhf.reward_model_evaluation import evaluate
from rlhf.run_folder import RunFolder
from rlhf.saver import Saver
from rlhf.settings import ConfigError
from rlhf.state import Cursor


class RewardModelTrainer:
    """One run. `RewardModelTrainer(config).run()` is all that `train.py` does."""

    def __init__(self, config: RewardModelConfig) -> None:
        """Reads everything but the weights. Raises ValueError for bad input."""
        self.config = config
        self.tokenizer = load_tokenizer(config.model.path)
        self.pad_token_id = pad_token_of(self.tokenizer)
        self.train, self.held_out = (
            load_examples(path, config.data, config.score, self.tokenizer)
            for path in (config.data.train, config.data.eval)
        )
        if config.batch.low < world_size():
            raise ConfigError(
                f"batch.low is {config.batch.low}, fewer than the {world_size()} ranks that share a batch"
            )
        self.folder = RunFolder(Path(config.run_dir).expanduser())
        self.place = "start"
        """What the run is doing."""

    def run(self) -> None:
        """Trains from the start or the last checkpoint to the last step, or until interrupted.

        Raises RunFolderError, ModelError or CheckpointError, which say what to do.
        """
        with world() as self.world, recording(self.folder, self.config, self.world) as self.monitor:
            self.monitor.on_phase = self._at
            with self.monitor.phase("load"):
                self._build()
                # whole on every rank, so the first one waits for no part of another
                section = self.config.checkpoint
                self.saver = Saver(self.folder.checkpoints, section, self.world, timeout=0.0)
                self._resume()
            with Interrupt(self.monitor.warn, alone=self.world.size == 1) as self.interrupt:
                try:
                    self._train()
                except Interrupted:
                    self._save()
                    self.saver.wait()
                    self.monitor.note("stopped; continue with checkpoint.resume=auto")
                    return
            self.saver.wait()
            self._finish()

    def _at(self, phase: str) -> None:
        """The other ranks are told, and an exception finds it here."""
        self.place = phase
        self.world.at(phase)

    def step(self) -> Metrics:
        """One update."""
        self.monitor.phase("learn")
        batch = next_batch(self.train, self.config, self.cursor.position)
        learned = self.learner.update(batch, step=self.cursor.steps_done)
        self.cursor.position += len(batch)
        self.cursor.steps_done += 1
        metrics = self.world.merge(learned)
        return metrics | {"reward_model/examples": Max(float(len(batch)))}

    def _build(self) -> None:
        config = self.config
        policy = Policy.load(config.model, config.model.path, self.world.device)
        self.model = RewardModel(policy, len(config.score.objectives))
        dtype = getattr(torch, config.model.dtype)
        optimizer = MasterAdamW(self.model.module, dtype, config.learner, config.steps)
        if config.model.gradient_checkpointing:
            policy.checkpoint_activations()
        self.learner = RewardModelLearner(self.model, optimizer, config, self.world)
        self.cursor = Cursor()
        self.stateful = {"cursor": self.cursor, "model": optimizer}

    def _train(self) -> None:
        config, cursor = self.config, self.cursor
        if cursor.steps_done == 0:
            self._evaluate()
        while cursor.steps_done < config.steps:
            if any(self.world.gather(self.interrupt.requested)):
                raise Interrupted
            started = time.monotonic()
            tokens = cursor.position
            metrics = self.step()
            self.saver.check()
            speed = Mean(float(cursor.position - tokens), time.monotonic() - started)
            memory = Max(self.world.peak_memory_gib())
            self.monitor.log(
                cursor.steps_done,
                metrics | {"throughput/examples_per_second": speed, "memory/peak_gib": memory},
            )
            last = cursor.steps_done == config.steps
            score = None
            if last or (config.eval.every and cursor.steps_done % config.eval.every == 0):
                score = self._evaluate()
            if last or (config.checkpoint.every and cursor.steps_done % config.checkpoint.every == 0):
                self._save(score)

    def _evaluate(self) -> float:
        """The accuracy."""
        with self.monitor.phase("eval"):
            record, details = evaluate(self.learner, self.held_out, self.config, self.cursor.steps_done)
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

    def _save(self, score: float | None = None) -> None:
        with self.monitor.phase("save"):
            self.saver.save(self.cursor.steps_done, self.stateful, score=score)

    def _resume(self) -> None:
        newest = self.saver.newest() if self.config.checkpoint.resume == "auto" else None
        if newest is not None:
            self.saver.resume(newest, self.stateful)
            self.monitor.note(f"resumed from {newest} after step {self.cursor.steps_done}")
        if self.world.is_main:
            self.folder.cut(after=self.cursor.steps_done if newest is not None else -1)

    def _finish(self) -> None:
        if not self.world.is_main:
            return
        if self.config.checkpoint.export:
            target = self.folder.path / "model"
            scorer = self.model.export(self.config.score.objectives, self.pad_token_id)
            checkpoint.export(scorer, self.tokenizer, target)
            self.monitor.note(f"the reward model is in {target}")
        self.monitor.close()


def describe(trainer: RewardModelTrainer) -> Iterator[str]:
    """What a run of this config will do: the lines `rlhf check` prints."""
    config = trainer.config
    yield f"model        {config.model.path}, computed in {config.model.dtype}"
    yield f"scores       {', '.join(config.score.objectives)}, from {config.score.kind}"
    yield f"data         {len(trainer.train)} examples, {len(trainer.held_out)} held out"
    batch = config.batch
    yield f"an update    {batch.low} to {batch.high} examples of about {batch.tokens} tokens"
    yield f"the run      {config.steps} steps, learning rate {config.learner.lr:g}"
    yield f"run folder   {config.run_dir}"


def _sentences(details: dict[str, Any]) -> Iterator[str]:
    for name, found in details["objectives"].items():
        yield f"{name}: calibration error {found['calibration_error']:.3f}"
