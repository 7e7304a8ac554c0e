"""The loop that every task shares: open the run, resume, step, log, evaluate, save, finish.

A task is a subclass of `Loop`: `rlhf.trainer.Trainer` trains a policy, and
`rlhf.reward_model.trainer.RewardModelTrainer` a reward model. `run()` calls the methods of a task in this
order; a task must define those with a star, the others do nothing or have a default:

    run_resources, record     before anything is loaded; both are closed last
    build *                   loads weights; then the newest checkpoint, if there is one, and `sync`
    training_resources        closed after the last step
    sync                      in a new run
    prepare
    evaluate *                in a new run
    step *, inspect           until `config.steps` steps are done or `ends_early` is true;
    evaluate *                    every `config.eval.every` steps and after the last one; checkpoints likewise
    finish *

To add a task: its settings in rlhf/config/ (with `run_dir`, `steps`, `eval.every`, `checkpoint`, `monitor`),
in `Settings` below, and its name in `TASKS` and `load_task` of rlhf/config/load.py; a subclass of `Loop` in a
folder of its own, as rlhf/reward_model/; and a branch in `_trainer` of rlhf/cli.py and in `run_check` of
rlhf/commands/check.py.
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
from rlhf.checkpoints.stateful import CheckpointError, Cursor, Stateful
from rlhf.compute_dtype import config_with, in_words, slowness, with_dtype
from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.run import Config
from rlhf.devices import give_back_memory
from rlhf.distributed.world import World, world
from rlhf.interrupt import Interrupt, Interrupted
from rlhf.metrics import Max, Mean, Metrics
from rlhf.monitoring.monitor import Monitor
from rlhf.monitoring.recording import recording
from rlhf.monitoring.result import Result, result_of
from rlhf.monitoring.run_folder import RunFolder, changed_settings, with_origin

Settings = TypeVar("Settings", Config, RewardModelConfig)


@dataclass(frozen=True, slots=True)
class Running:
    """What exists while a run is open, between `open()` and its end."""

    world: World
    monitor: Monitor
    saver: Saver
    interrupt: Interrupt
    stateful: Mapping[str, Stateful]
    """The objects whose state a checkpoint holds, by name."""
    training: ExitStack
    """Closes what is needed for training only, after the last step: engines, signal handlers."""


class Loop(ABC, Generic[Settings]):
    """One run of a task. `rlhf train` calls `run()`; `with task.open(): task.step()` makes single steps."""

    throughput: ClassVar[tuple[str, str]]
    """The metric of speed, and the metric of a step that is divided by the seconds of the step to get it."""

    def __init__(self, config: Settings, *, timeout: float) -> None:
        """`timeout`: seconds that a rank waits for the others before it fails."""
        self.folder, self.timeout = RunFolder(Path(config.run_dir).expanduser()), timeout
        # read now: `record` replaces the file
        self._settings_before = self.folder.settings()
        self.config = with_dtype(config, earlier=self._settings_before)
        self.cursor = Cursor()
        self.place = "start"
        """What the run is doing, for error messages: a phase, with its step once weights are loaded."""
        self._running: Running | None = None
        self._last_score: tuple[int, float | None] = -1, None
        """The step and the score of the last evaluation."""

    @abstractmethod
    def build(self, world: World, monitor: Monitor) -> Mapping[str, Stateful]:
        """Loads weights and builds what a step needs.

        Returns the objects whose state a checkpoint holds, by name; `cursor` has to be among them.
        """

    @abstractmethod
    def step(self) -> Metrics:
        """Makes one step and adds 1 to `cursor.steps_done`. Returns the metrics, merged over the ranks."""

    @abstractmethod
    def evaluate(self) -> float | None:
        """Returns the score by which the best checkpoints are kept; None where there is no held-out data."""

    @abstractmethod
    def finish(self) -> None:
        """Runs after the last step: exports the model, writes the report. Every rank calls it."""

    def run_resources(self) -> AbstractContextManager[object]:
        """Closes what `__init__` opened, at the very end of the run."""
        return nullcontext()

    def record(self, world: World) -> AbstractContextManager[Monitor]:
        """Claims the run folder and starts the monitor; releases both at the end of the run."""
        return recording(self.folder, self.config, world)

    def training_resources(self) -> AbstractContextManager[object]:
        """Closes what only steps need (a rollout engine), after the last step and before `finish`."""
        return nullcontext()

    def sync(self) -> None:
        """Sends weights to the rollout engine: at the start of a run, and after a checkpoint was loaded."""

    def prepare(self) -> None:
        """Runs before the first step of every run, a resumed one too."""

    @property
    def is_within_step(self) -> bool:
        """Whether a resumed run goes on within a step, whose first updates may have been made already."""
        return False

    def inspect(self, metrics: Metrics) -> tuple[Metrics, Sequence[str]]:
        """Further metrics, and warnings, that follow from the metrics of a step."""
        return {}, ()

    @property
    def ends_early(self) -> bool:
        """Whether the run has to end now, before `config.steps` steps are done."""
        return False

    @property
    def running(self) -> Running:
        """What exists while the run is open. Raises RuntimeError outside `open()`."""
        if self._running is None:
            raise RuntimeError("the run is not open: call run(), or step() within `with trainer.open():`")
        return self._running

    @property
    def world(self) -> World:
        return self.running.world

    @property
    def monitor(self) -> Monitor:
        return self.running.monitor

    def run(self) -> Result:
        """Trains from the start, or from the last checkpoint, to the last step or until interrupted.

        Returns the last metrics, the evaluations and where the model is, as the files of the run have them.

        Raises RunFolderError, SinkError, ModelError, CheckpointError, RewardError, EngineError, SyncError or
        RankError, whose messages say what to do.
        """
        with self.open() as running:
            try:
                self._train()
            except Interrupted:
                self._save_interrupted()
                return result_of(self.folder, steps=self.cursor.steps_done, model=None)
            running.training.close()
            running.saver.wait()
            self.finish()
            model = self.folder.path / "model" if self.config.checkpoint.export else None
            return result_of(self.folder, steps=self.cursor.steps_done, model=model)

    @contextmanager
    def open(self) -> Generator[Running]:
        """Joins the ranks, claims the run folder, loads everything and resumes. Raises what `run` does."""
        with (
            self.run_resources(),
            self._joined() as ranks,
            self.record(ranks) as monitor,
            ExitStack() as training,
        ):
            monitor.on_phase = lambda phase: self._enter_phase(phase, ranks)
            with monitor.phase("load"):
                dtype = self.config.model.dtype
                monitor.note(f"the model computes in {in_words(dtype, ranks.device)}")
                if warning := slowness(dtype, ranks.device):
                    monitor.warn(warning)
                stateful = self.build(ranks, monitor)
                saver = Saver(self.folder.checkpoints, self.config.checkpoint, ranks, timeout=self.timeout)
                interrupt = Interrupt(monitor.warn, alone=ranks.size == 1)
                self._running = Running(ranks, monitor, saver, interrupt, stateful, training)
                self._resume()
                give_back_memory()
            training.enter_context(self.training_resources())
            training.enter_context(interrupt)
            try:
                yield self._running
            finally:
                self._running = None

    @contextmanager
    def _joined(self) -> Generator[World]:
        """All ranks, computing in the type that the first one has chosen."""
        with world(self.timeout) as ranks:
            self.config = config_with(self.config, ranks.gather(self.config.model.dtype)[0])
            yield ranks

    def agree_to_stop(self) -> None:
        """Raises Interrupted on every rank when any of them was asked to stop. Every rank has to call it,
        before the first update of a step.
        """
        if any(self.world.gather(self.running.interrupt.requested)):
            raise Interrupted

    def _enter_phase(self, phase: str, ranks: World) -> None:
        """Records what the run is doing, here and for the other ranks' error messages."""
        self.place = phase if self._running is None else f"{phase}, step {self.cursor.steps_done + 1}"
        ranks.at(self.place)

    def _train(self) -> None:
        config, cursor = self.config, self.cursor
        if cursor.steps_done == 0:
            self.sync()
        self.prepare()
        if cursor.steps_done == 0 and not self.is_within_step:
            self._evaluate()
        while cursor.steps_done < config.steps and not self.ends_early:
            started = time.monotonic()
            metrics = self.step()
            self.running.saver.check()
            more, texts = self.inspect(metrics)
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
        self._last_score = self.cursor.steps_done, self.evaluate()

    def _save(self) -> None:
        step, score = self._last_score
        score = score if step == self.cursor.steps_done else None
        with self.monitor.phase("save"):
            self.running.saver.save(self.cursor.steps_done, self.running.stateful, score=score)

    def _resume(self) -> None:
        saver, monitor, cursor = self.running.saver, self.monitor, self.cursor
        newest = saver.newest() if self.config.checkpoint.resume == "auto" else None
        if newest is None:
            self._assert_new()
        else:
            saver.resume(newest, self.running.stateful)
            self.sync()
            monitor.note(f"resumed from {newest} after step {cursor.steps_done} of {self.config.steps}")
            changes = changed_settings(self._settings_before or "", self.config.to_yaml())
            if changes:
                monitor.warn(f"the run continues with other settings than before: {'; '.join(changes)}")
            if cursor.other_data:
                monitor.warn(
                    "the training data is other data than that of the checkpoint: it was edited or replaced "
                    "since, and the run goes on with it, in a new order"
                )
            if cursor.steps_done >= self.config.steps:
                monitor.warn("every step is done already; to continue the run, set steps to a larger number")
        if self.world.is_main:
            self.folder.write_settings(with_origin(self.config.to_yaml()))
            after = -1 if newest is None else cursor.steps_done
            for text in self.folder.cut(after=after, sampled=after + self.is_within_step):
                monitor.warn(text)

    def _assert_new(self) -> None:
        """Raises CheckpointError where the folder holds a run that has saved checkpoints: to begin again
        would overwrite it. A run that was ended before its first checkpoint begins again.
        """
        traces = self.world.gather(self.folder.traces())[0]
        if traces:
            raise CheckpointError(
                "\n".join(
                    [
                        f"the run in {self.folder.path} cannot be continued: none of its checkpoints can be "
                        "read. Nothing was changed.",
                        *traces,
                        *self.running.saver.passed_over,
                        "Bring the checkpoints back (is their disk mounted? were they written by a newer "
                        "version?), or begin a new run in another run_dir",
                    ]
                )
            )
        if self.world.is_main and self.folder.metrics.is_file() and self.folder.metrics.stat().st_size:
            self.monitor.warn(
                "no checkpoint was saved before the run ended: it begins again with step 1, and its logged "
                "steps are written anew"
            )

    def _save_interrupted(self) -> None:
        """Saves a checkpoint. A resumed run continues an interrupted step with its next update, or repeats
        the step where no update was made.
        """
        self._save()
        self.running.saver.wait()
        self.monitor.note(
            f"stopped after step {self.cursor.steps_done} of {self.config.steps}; everything is saved in "
            f"{self.folder.path}. Continue with checkpoint.resume=auto"
        )
