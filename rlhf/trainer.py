"""The loop: roll out, score, learn, sync; evaluate, save, resume. `parts.py` builds what it goes over."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, replace
from pathlib import Path

from rlhf import checkpoint
from rlhf.allocator import give_back_memory
from rlhf.balance import deal
from rlhf.collector import Hooks
from rlhf.config import Config
from rlhf.distributed import world, world_size
from rlhf.evaluation import Evaluation, evaluate
from rlhf.interrupt import Interrupt, Interrupted
from rlhf.metrics import Max, Mean, Metrics
from rlhf.monitor import Monitor
from rlhf.parts import build_parts
from rlhf.preflight import load_inputs, warnings
from rlhf.recording import recording
from rlhf.report import closing_summary, write_report
from rlhf.run_folder import RunFolder, changed_settings
from rlhf.samples import TokenTexts
from rlhf.saver import Saver
from rlhf.sharding import as_whole, gathered
from rlhf.state import Cursor


class Trainer:
    """One run. `Trainer(config).run()` is all that `train.py` does."""

    def __init__(self, config: Config) -> None:
        """Reads everything but the weights. Raises ValueError for bad input."""
        self.config = config
        self.inputs = load_inputs(config, world_size=world_size())
        self.folder = RunFolder(Path(config.run_dir).expanduser())
        self._settings_before = self.folder.settings()
        self.evaluated: Evaluation | None = None
        self.place = "start"
        """What the run is doing."""
        self._cursor: Cursor | None = None

    def run(self) -> None:
        """Trains from the start or the last checkpoint to the last step, or until interrupted.

        Raises RunFolderError, ModelError, CheckpointError, RewardError or SyncError, which say what to do.
        """
        with (
            closing(self.inputs.rewards),
            world(self.config.distributed.timeout) as self.world,
            self._recording() as self.monitor,
        ):
            self.monitor.on_phase = self._at
            self.inputs.rewards.print_to(self.folder.rewards_log)
            with self.monitor.phase("load"):
                self.parts = build_parts(self.config, self.inputs, self.world)
                self._cursor = self.parts.cursor
                self.saver = Saver(
                    self.folder.checkpoints,
                    self.config.checkpoint,
                    self.world,
                    timeout=self.config.distributed.timeout,
                )
                self._resume()
                give_back_memory()
                for text in warnings(self.config, self.inputs):
                    self.monitor.warn(text)
            with (
                closing(self.parts.engine),
                Interrupt(self.monitor.warn, alone=self.world.size == 1) as self.interrupt,
            ):
                try:
                    self._train()
                except Interrupted:
                    self._leave()
                    return
            self.saver.wait()
            self._finish()

    def _recording(self) -> AbstractContextManager[Monitor]:
        shown, texts = self.config.monitor.samples_per_step, TokenTexts(self.inputs.tokenizer)
        return recording(self.folder, self.config, self.world, samples_per_step=shown, texts=texts)

    def step(self) -> Metrics:
        """One round: rollouts and rewards, unless the buffer has some left; updates, weight sync."""
        parts, cursor = self.parts, self.parts.cursor
        if parts.buffer.experience is None:
            self._fill()
        parts.engine.release()
        self._learn()
        self.monitor.learned(parts.learner.entropy)
        cursor.steps_done += 1
        self.monitor.phase("sync")
        parts.sync.push(parts.engine, version=cursor.steps_done)
        parts.ahead.settle()
        metrics = self.world.merge(parts.buffer.empty())
        return metrics | parts.kl.adapt(metrics) | parts.learner.warmup.adapt(metrics)

    def _fill(self) -> None:
        """Samples and scores what this step learns from. The memory of the parts changes only at its end."""
        parts, cursor = self.parts, self.parts.cursor
        hooks = Hooks(cursor.steps_done, self.monitor.phase, self.interrupt.check)
        collected = parts.ahead.current(lambda: parts.collector.begin(cursor.position, hooks))
        self._agree_to_stop()
        pending = None
        if parts.ahead.steps and hooks.step + 1 < self.config.steps:
            pending = parts.collector.begin(collected.position, replace(hooks, step=hooks.step + 1))
        self.monitor.phase("learn")
        groups, age = parts.ahead.fresh(collected.groups, version=hooks.step)
        section, seed = self.config.learner, self.config.seed
        dealt, numbers = deal(groups, self.world, section, seed=seed, step=hooks.step)
        experience = parts.experience.build(dealt, kl_coef=parts.kl.value, step=hooks.step, numbers=numbers)
        cursor.position = collected.position
        parts.ahead.next(pending)
        self.monitor.samples(hooks.step + 1, dealt, experience)
        measured = collected.metrics | age
        observed = parts.budgets.observe(collected.sampled) | parts.constraints.observe(collected.sampled)
        parts.buffer.fill(experience, measured | observed | parts.learner.before(experience))

    def _learn(self) -> None:
        buffer, step = self.parts.buffer, self.parts.cursor.steps_done
        assert buffer.experience is not None
        self.monitor.phase("learn")
        for metrics in self.parts.learner.updates(
            buffer.experience,
            step=step,
            seed=self.config.seed,
            kl_coef=self.parts.kl.value,
            done=buffer.updates,
        ):
            buffer.advance(metrics)
            # alone: a checkpoint has the buffer of one rank only, so several stop between two steps
            self.interrupt.check()

    def _train(self) -> None:
        config, cursor = self.config, self.parts.cursor
        if cursor.steps_done == 0:
            self.parts.sync.push(self.parts.engine, version=0)
        self._prepare()
        if cursor.steps_done == 0:
            self._evaluate()
        while cursor.steps_done < config.steps and not self.parts.hacking.stops:
            started = time.monotonic()
            metrics = self.step()
            self.saver.check()
            tokens, seconds = metrics["rollout/tokens"].value, time.monotonic() - started
            speed: Metrics = {
                "throughput/tokens_per_second": Mean(tokens, seconds),
                "memory/peak_gib": Max(self.world.peak_memory_gib()),
            }
            signs, texts = self.parts.hacking.look(metrics)
            self.monitor.log(cursor.steps_done, metrics | speed | signs)
            for text in texts:
                self.monitor.warn(text)
            last = cursor.steps_done == config.steps or self.parts.hacking.stops
            if last or (config.eval.every and cursor.steps_done % config.eval.every == 0):
                self._evaluate()
            if last or (config.checkpoint.every and cursor.steps_done % config.checkpoint.every == 0):
                self._save()

    def _at(self, phase: str) -> None:
        """The other ranks are told, and an exception finds it here."""
        self.place = phase if self._cursor is None else f"{phase}, step {self._cursor.steps_done + 1}"
        self.world.at(self.place)

    def _prepare(self) -> None:
        with self.monitor.phase("prepare"):
            for prepare in self.parts.preparations:
                self.interrupt.check()
                self.monitor.note(prepare())

    def _evaluate(self) -> None:
        held_out, step = self.inputs.eval, self.parts.cursor.steps_done
        if held_out is None:
            return
        with self.monitor.phase("eval"):
            # a later one is part of its step: given up, it would not be repeated
            between = self.interrupt.check if step == 0 else None
            result = evaluate(self.parts.sampler, held_out, self.config, self.world, step, between)
        self.evaluated = result
        if self.world.is_main:
            self.monitor.evaluated(asdict(result))

    def _agree_to_stop(self) -> None:
        """A stop that any rank was asked for is everyone's, before an update and never within one."""
        if any(self.world.gather(self.interrupt.requested)):
            raise Interrupted

    def _save(self) -> None:
        cursor, evaluated = self.parts.cursor, self.evaluated
        score = evaluated.accuracy if evaluated is not None and evaluated.step == cursor.steps_done else None
        with self.monitor.phase("save"):
            self.saver.save(cursor.steps_done, self.parts.stateful, score=score)

    def _resume(self) -> None:
        cursor = self.parts.cursor
        newest = self.saver.newest() if self.config.checkpoint.resume == "auto" else None
        if newest is not None:
            self.saver.resume(newest, self.parts.stateful)
            self.parts.sync.push(self.parts.engine, version=cursor.steps_done)
            self.monitor.note(f"resumed from {newest} after step {cursor.steps_done} of {self.config.steps}")
            changes = changed_settings(self._settings_before or "", self.config.to_yaml())
            if changes:
                self.monitor.warn(f"the run goes on with other settings than before: {'; '.join(changes)}")
            if cursor.steps_done >= self.config.steps:
                self.monitor.warn("every step is done already: a larger number of steps goes on")
        if self.world.is_main:
            after = cursor.steps_done if newest is not None else -1
            self.folder.cut(after=after, sampled=after + (self.parts.buffer.experience is not None))

    def _leave(self) -> None:
        """A step whose rollouts are done is saved as far as it came, one that still samples is repeated."""
        self._save()
        self.saver.wait()
        done = self.parts.cursor.steps_done
        self.monitor.note(
            f"stopped after step {done} of {self.config.steps}; everything is saved in {self.folder.path}. "
            "Continue with checkpoint.resume=auto"
        )

    def _finish(self) -> None:
        policy, path, exports = self.parts.policy, self.folder.path, self.config.checkpoint.export
        if not self.world.is_main:
            for _ in gathered(policy.rollout_model) if exports else ():
                pass
            return
        with self.monitor.phase("export"):
            if exports:
                reader = self.inputs.processor or self.inputs.tokenizer
                checkpoint.export(as_whole(policy.rollout_model), reader, path / "model")
                if policy.adapter is not None:
                    checkpoint.export(policy.adapter, reader, path / "adapter")
            write_report(self.folder)
        self.monitor.close()
        self.monitor.note(closing_summary(self.folder))
