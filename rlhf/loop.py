"""The loop that every task shares: open, resume, step, log, evaluate, save, leave.

A task is a subclass that says what is built, what a step is, how it is evaluated and how the run ends:
`rlhf.trainer.Trainer` for a policy, `rlhf.reward_model.trainer.RewardModelTrainer` for a reward model.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from rlhf.checkpoints.saver import Saver
from rlhf.checkpoints.stateful import Cursor, Stateful
from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.run import Config
from rlhf.devices import give_back_memory
from rlhf.distributed.world import World, world
from rlhf.interrupt import Interrupt, Interrupted
from rlhf.metrics import Max, Mean, Metrics
from rlhf.monitoring.monitor import Monitor
from rlhf.monitoring.recording import recording
from rlhf.monitoring.run_folder import RunFolder, changed_settings

Settings = TypeVar("Settings", Config, RewardModelConfig)


@dataclass(frozen=True, slots=True)
class Running:
    """What there is while a run is open."""

    world: World
    monitor: Monitor
    saver: Saver
    interrupt: Interrupt
    stateful: Mapping[str, Stateful]
    """What a checkpoint holds, by name."""
    training: ExitStack
    """What is needed until the last step and not after it: engines, the handlers of signals."""


class Loop(ABC, Generic[Settings]):
    """One run. `run()` is all that `rlhf train` calls; `with loop.open(): loop.step()` makes single steps."""

    throughput: ClassVar[tuple[str, str]]
    """Name of the metric of speed, and the metric of a step that it divides by the step's seconds."""

    def __init__(self, config: Settings, *, timeout: float) -> None:
        """`timeout`: seconds that one rank waits for another."""
        self.config, self.timeout = config, timeout
        self.folder = RunFolder(Path(config.run_dir).expanduser())
        self._settings_before = self.folder.settings()
        self.cursor = Cursor()
        self.place = "start"
        """What the run is doing: a phase, and the step that it belongs to once everything is loaded."""
        self._running: Running | None = None
        self._score: tuple[int, float | None] = -1, None
        """Step and score of the last evaluation."""

    @abstractmethod
    def build(self, world: World, monitor: Monitor) -> Mapping[str, Stateful]:
        """Loads weights and builds what a step needs. Returns what a checkpoint holds, by name."""

    @abstractmethod
    def step(self) -> Metrics:
        """One step, within `open()`; moves `cursor` on."""

    @abstractmethod
    def evaluate(self) -> float | None:
        """The score by which checkpoints are compared; None where there is nothing to evaluate on."""

    @abstractmethod
    def finish(self) -> None:
        """After the last step: the export, the report. Every rank calls it."""

    def resources(self) -> AbstractContextManager[object]:
        """What is held for the whole run and was there before it."""
        return nullcontext()

    def record(self, world: World) -> AbstractContextManager[Monitor]:
        """Claims the run folder and starts the monitor."""
        return recording(self.folder, self.config, world)

    def engine(self) -> AbstractContextManager[object]:
        """What is closed after the last step, before `finish`."""
        return nullcontext()

    def sync(self) -> None:
        """Sends weights to where they are sampled from: at the start, and when a checkpoint brought them."""

    def prepare(self) -> None:
        """What is done once, before the first step, after `sync`."""

    def shown_step(self) -> int:
        """The last step whose samples are shown already."""
        return self.cursor.steps_done

    def look(self, metrics: Metrics) -> tuple[Metrics, Sequence[str]]:
        """More metrics of a step, and warnings that follow from its metrics."""
        return {}, ()

    @property
    def ends_early(self) -> bool:
        """Whether the run is to end before its last step."""
        return False

    @property
    def running(self) -> Running:
        """Raises RuntimeError outside `open()`."""
        if self._running is None:
            raise RuntimeError("the run is not open: call run(), or step() within `with trainer.open():`")
        return self._running

    @property
    def world(self) -> World:
        return self.running.world

    @property
    def monitor(self) -> Monitor:
        return self.running.monitor

    def run(self) -> None:
        """Trains from the start or the last checkpoint to the last step, or until interrupted.

        Raises RunFolderError, ModelError, CheckpointError, RewardError or SyncError, which say what to do.
        """
        with self.open() as running:
            try:
                self._train()
            except Interrupted:
                self._leave()
                return
            running.training.close()
            running.saver.wait()
            self.finish()

    @contextmanager
    def open(self) -> Generator[Running]:
        """Joins the ranks, claims the run folder, loads everything and resumes. Raises as `run` does."""
        with (
            self.resources(),
            world(self.timeout) as ranks,
            self.record(ranks) as monitor,
            ExitStack() as training,
        ):
            monitor.on_phase = lambda phase: self._at(phase, ranks)
            with monitor.phase("load"):
                stateful = self.build(ranks, monitor)
                saver = Saver(self.folder.checkpoints, self.config.checkpoint, ranks, timeout=self.timeout)
                interrupt = Interrupt(monitor.warn, alone=ranks.size == 1)
                self._running = Running(ranks, monitor, saver, interrupt, stateful, training)
                self._resume()
                give_back_memory()
            training.enter_context(self.engine())
            training.enter_context(interrupt)
            try:
                yield self._running
            finally:
                self._running = None

    def agree_to_stop(self) -> None:
        """Raises Interrupted on every rank when any was asked to stop; before an update, never within one."""
        if any(self.world.gather(self.running.interrupt.requested)):
            raise Interrupted

    def _at(self, phase: str, ranks: World) -> None:
        """The other ranks are told, and an exception finds it here."""
        self.place = phase if self._running is None else f"{phase}, step {self.cursor.steps_done + 1}"
        ranks.at(self.place)

    def _train(self) -> None:
        config, cursor = self.config, self.cursor
        if cursor.steps_done == 0:
            self.sync()
        self.prepare()
        if cursor.steps_done == 0:
            self._evaluate()
        while cursor.steps_done < config.steps and not self.ends_early:
            started = time.monotonic()
            metrics = self.step()
            self.running.saver.check()
            more, texts = self.look(metrics)
            self.monitor.log(
                cursor.steps_done, metrics | self._speed(metrics, time.monotonic() - started) | more
            )
            for text in texts:
                self.monitor.warn(text)
            last = cursor.steps_done == config.steps or self.ends_early
            if last or (config.eval.every and cursor.steps_done % config.eval.every == 0):
                self._evaluate()
            if last or (config.checkpoint.every and cursor.steps_done % config.checkpoint.every == 0):
                self._save()

    def _speed(self, metrics: Metrics, seconds: float) -> Metrics:
        name, counted = self.throughput
        return {
            name: Mean(metrics[counted].value, seconds),
            "memory/peak_gib": Max(self.world.peak_memory_gib()),
        }

    def _evaluate(self) -> None:
        self._score = self.cursor.steps_done, self.evaluate()

    def _save(self) -> None:
        step, score = self._score
        score = score if step == self.cursor.steps_done else None
        with self.monitor.phase("save"):
            self.running.saver.save(self.cursor.steps_done, self.running.stateful, score=score)

    def _resume(self) -> None:
        saver, monitor, cursor = self.running.saver, self.monitor, self.cursor
        newest = saver.newest() if self.config.checkpoint.resume == "auto" else None
        if newest is not None:
            saver.resume(newest, self.running.stateful)
            self.sync()
            monitor.note(f"resumed from {newest} after step {cursor.steps_done} of {self.config.steps}")
            changes = changed_settings(self._settings_before or "", self.config.to_yaml())
            if changes:
                monitor.warn(f"the run goes on with other settings than before: {'; '.join(changes)}")
            if cursor.steps_done >= self.config.steps:
                monitor.warn("every step is done already: a larger number of steps goes on")
        if self.world.is_main:
            after = -1 if newest is None else cursor.steps_done
            self.folder.cut(after=after, sampled=-1 if newest is None else self.shown_step())

    def _leave(self) -> None:
        """What a step has done so far is saved where its updates have begun; otherwise it is repeated."""
        self._save()
        self.running.saver.wait()
        self.monitor.note(
            f"stopped after step {self.cursor.steps_done} of {self.config.steps}; everything is saved in "
            f"{self.folder.path}. Continue with checkpoint.resume=auto"
        )
