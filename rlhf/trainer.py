"""The loop: roll out, score, learn, sync; evaluate, save, resume. The only file that knows every part."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from rlhf import checkpoint
from rlhf.budgets import Budgets
from rlhf.collector import Collector, Sampler
from rlhf.config import Config
from rlhf.distributed import world, world_size
from rlhf.evaluation import evaluate
from rlhf.experience import ExperienceBuilder
from rlhf.interrupt import Interrupt, Interrupted
from rlhf.learner import Learner
from rlhf.metrics import Max, Mean, Metrics
from rlhf.monitor import Monitor
from rlhf.optimizer import MasterAdamW
from rlhf.policy import Policy
from rlhf.preflight import Inputs, load_inputs, warnings
from rlhf.report import closing_summary, write_report
from rlhf.rollout.factory import make_engine
from rlhf.run_folder import RunFolder
from rlhf.weights import WeightSync

TOLERANCE = {"bfloat16": 0.1, "float32": 1e-3}


class Trainer:
    """One run. `Trainer(config).run()` is all that `train.py` does."""

    def __init__(self, config: Config) -> None:
        """Reads everything but the weights. Raises ValueError for bad input."""
        self.config = config
        self.inputs = load_inputs(config, world_size=world_size())
        self.folder = RunFolder(Path(config.run_dir).expanduser())

    def run(self) -> None:
        """Trains from the start or the last checkpoint to the last step, or until interrupted.

        Raises RunFolderError, ModelError, CheckpointError, RewardError or SyncError, which say what to do.
        """
        with world() as self.world, self._folder_claimed(), self._monitored() as self.monitor:
            with self.monitor.phase("load"):
                self._build(self.inputs)
                self._resume()
                for text in warnings(self.config, self.inputs):
                    self.monitor.warn(text)
            with Interrupt(self.monitor.warn, alone=self.world.size == 1) as self.interrupt:
                try:
                    self._train()
                except Interrupted:
                    self._leave()
                    return
            self._finish()
            self.engine.close()

    def step(self) -> Metrics:
        """One round: rollouts, rewards, updates, weight sync."""
        collected = self.collector.collect(
            self.position, step=self.steps_done, phase=self.monitor.phase, between=self.interrupt.check
        )
        self.monitor.phase("learn")
        experience = self.experience.build(collected.groups, kl_coef=self.kl_coef)
        self._agree_to_stop()
        self.engine.release()
        learned = self.learner.update(
            experience, step=self.steps_done, seed=self.config.seed, kl_coef=self.kl_coef
        )
        self.position = collected.position
        self.steps_done += 1
        self.monitor.phase("sync")
        self.sync.push(self.engine, version=self.steps_done)
        self.monitor.samples(self.steps_done, collected.groups)
        observed = self.budgets.observe(collected.sampled)
        metrics = self.world.merge(collected.metrics | observed | learned)
        self._adapt_kl(metrics)
        return metrics

    def _build(self, inputs: Inputs) -> None:
        config, section = self.config, self.config.rollout
        algorithm = inputs.algorithm
        self.policy = Policy.load(config.model, config.model.path, self.world.device)
        dtype = getattr(torch, config.model.dtype)
        self.reference = None
        if algorithm.needs_reference:
            path = config.model.reference or config.model.path
            self.reference = Policy.load(config.model, path, self.world.device)
            self.reference.freeze(dtype)
        self.optimizer = MasterAdamW(self.policy.model, dtype, config.learner, config.steps)
        if config.model.gradient_checkpointing:
            self.policy.checkpoint_activations()
        self.engine = make_engine(
            section.engine,
            self.policy.model,
            eos_token_ids=inputs.eos_token_ids,
            kv_cache_gib=section.kv_cache_gib,
        )
        sampler = Sampler(self.engine, inputs.rewards, inputs.tokenizer, section, config.seed)
        self.sampler, self.held_out = sampler, inputs.eval
        self.budgets = Budgets(config.budget, config.reward, section.group_size, self.world)
        self.collector = Collector(sampler, inputs.train, algorithm, self.budgets, self.world)
        self.experience = ExperienceBuilder(
            self.policy,
            self.reference,
            algorithm,
            self.world,
            temperature=section.temperature,
            microbatch_tokens=config.learner.microbatch_tokens,
            keep_old=config.learner.epochs * config.learner.minibatches > 1,
            advantage_clip=config.budget.advantage_clip if config.budget.rule == "knapsack" else None,
            objective_weights=lambda: inputs.rewards.weights,
        )
        self.learner = Learner(
            self.policy,
            self.reference,
            algorithm,
            self.optimizer,
            self.world,
            config.learner,
            temperature=section.temperature,
        )
        tolerance = section.sync_tolerance or TOLERANCE[config.model.dtype]
        self.sync = WeightSync(
            self.policy, inputs.train[0], temperature=section.temperature, tolerance=tolerance
        )
        self.kl_coef, self.kl_controller = algorithm.kl.coef, algorithm.kl.controller
        self.steps_done, self.position = 0, 0

    def _train(self) -> None:
        config = self.config
        if self.steps_done == 0:
            self.sync.push(self.engine, version=0)
            self._evaluate()
        while self.steps_done < config.steps:
            started = time.monotonic()
            metrics = self.step()
            tokens, seconds = metrics["rollout/tokens"].value, time.monotonic() - started
            speed: Metrics = {
                "throughput/tokens_per_second": Mean(tokens, seconds),
                "memory/peak_gib": Max(self.world.peak_memory_gib()),
            }
            self.monitor.log(self.steps_done, metrics | speed)
            last = self.steps_done == config.steps
            if last or (config.eval.every and self.steps_done % config.eval.every == 0):
                self._evaluate()
            if last or (config.checkpoint.every and self.steps_done % config.checkpoint.every == 0):
                self._save()

    def _adapt_kl(self, metrics: Metrics) -> None:
        """Moves the KL coefficient towards the target, if there is one and this step measured a KL."""
        observed = metrics["kl/ref"].value if "kl/ref" in metrics else math.nan
        if self.kl_controller is not None and math.isfinite(observed):
            controller = replace(self.kl_controller, coef=self.kl_coef)
            self.kl_coef = controller.update(observed, int(metrics["rollout/samples"].value)).coef
            metrics["kl/coef"] = Max(self.kl_coef)

    def _evaluate(self) -> None:
        if self.held_out is None:
            return
        with self.monitor.phase("eval"):
            # a later one is part of its step: given up, it would not be repeated
            between = self.interrupt.check if self.steps_done == 0 else None
            result = evaluate(self.sampler, self.held_out, self.config, self.world, self.steps_done, between)
        if self.world.is_main:
            self.monitor.evaluated(asdict(result))

    def _agree_to_stop(self) -> None:
        """A stop that any rank was asked for is everyone's, before an update and never within one."""
        if any(self.world.gather(self.interrupt.requested)):
            raise Interrupted

    def _save(self) -> None:
        if not self.world.is_main:
            return
        with self.monitor.phase("save"):
            checkpoint.save(
                self.folder.checkpoints,
                step=self.steps_done,
                tensors=self.optimizer.tensors(),
                state={"position": self.position, "kl_coef": self.kl_coef, "budgets": self.budgets.state()},
                keep_last=self.config.checkpoint.keep_last,
            )

    def _resume(self) -> None:
        resume = self.config.checkpoint.resume == "auto"
        newest = checkpoint.latest(self.folder.checkpoints) if resume else None
        if newest is not None:
            saved = checkpoint.load(newest, device=self.world.device)
            self.optimizer.load(saved.tensors)
            self.steps_done, self.position = saved.step, saved.state["position"]
            self.kl_coef = saved.state["kl_coef"]
            self.budgets.load(saved.state["budgets"])
            self.sync.push(self.engine, version=self.steps_done)
            self.monitor.note(f"resumed from {newest} after step {self.steps_done} of {self.config.steps}")
        if self.world.is_main:
            self.folder.cut(after=self.steps_done if newest is not None else -1)

    def _leave(self) -> None:
        """The step under way is given up; it is repeated, the same, when the run is resumed."""
        self._save()
        self.monitor.note(
            f"stopped after step {self.steps_done} of {self.config.steps}; everything is saved in "
            f"{self.folder.path}. Continue with checkpoint.resume=auto"
        )

    def _finish(self) -> None:
        if not self.world.is_main:
            return
        if self.config.checkpoint.export:
            checkpoint.export(self.policy.model, self.inputs.tokenizer, self.folder.path / "model")
        write_report(self.folder)
        self.monitor.close()
        self.monitor.note(closing_summary(self.folder))

    @contextmanager
    def _folder_claimed(self) -> Generator[None]:
        if not self.world.is_main:
            yield
            return
        with self.folder.claim(config=self.config.to_yaml(), resume=self.config.checkpoint.resume == "auto"):
            yield

    @contextmanager
    def _monitored(self) -> Generator[Monitor]:
        if not self.world.is_main:
            yield Monitor.silent()
            return
        section = self.config.monitor
        settings = self.config.model_dump(mode="json")
        with Monitor.start(
            self.folder,
            sinks=section.sinks,
            total_steps=self.config.steps,
            samples_per_step=section.samples_per_step,
            settings=settings,
        ) as monitor:
            yield monitor
