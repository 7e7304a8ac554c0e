"""`Trainer`, the task that trains a policy: one step is rollouts, rewards, updates and a weight sync.

rlhf/loop.py runs the steps, saves and resumes; rlhf/components.py builds the parts that a step uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rlhf.checkpoints import store
from rlhf.checkpoints.stateful import Stateful
from rlhf.collect.sampler import Hooks
from rlhf.components import Components, build_components
from rlhf.config.run import Config
from rlhf.data.identity import digest
from rlhf.distributed.world import World, world_size
from rlhf.evaluation.accuracy import evaluate, with_pairs
from rlhf.learn.dealing import deal
from rlhf.loop import Loop
from rlhf.metrics import Max, Metrics
from rlhf.models.sharding import as_whole, gathered
from rlhf.models.vision.processor import Reader
from rlhf.monitoring.monitor import Monitor
from rlhf.monitoring.objects import Function, Rows, with_objects
from rlhf.monitoring.recording import recording
from rlhf.monitoring.report.summary import closing_summary, write_report
from rlhf.monitoring.samples import TokenTexts
from rlhf.preflight.describe import seconds_per_step, warnings
from rlhf.preflight.load import load_inputs
from rlhf.preflight.resume import check_resume


class Trainer(Loop[Config]):
    """One run of a policy. `Trainer(config).run()` is what `rlhf train` calls.

    From Python, reward functions and rows may be objects:

        result = Trainer({"run_dir": "runs/own", ...}, reward=my_function, train=rows, eval=held_out).run()
    """

    throughput: ClassVar[tuple[str, str]] = ("throughput/tokens_per_second", "rollout/tokens")

    def __init__(
        self,
        config: Config | Mapping[str, Any] | str | Path,
        *,
        reward: Function | Sequence[Function] | None = None,
        train: Rows | None = None,
        eval: Rows | None = None,
    ) -> None:
        """Reads and checks everything except weights. Raises ValueError for bad input.

        `config`: settings, or what `load_config` reads them from. `reward`: one or several functions in place
        of `reward.functions`; an entry may also be one of that setting, `{"path": function, "weight": 0.5}`.
        `train`, `eval`: rows in place of `data.train` and `data.eval` (docs/training.md, "From Python").
        """
        config, pickles = with_objects(config, reward, train, eval)
        super().__init__(config, timeout=config.distributed.timeout)
        self.inputs = load_inputs(self.config, world_size=world_size(), pickles=pickles)
        check_resume(self.config, self.inputs)
        self._components: Components | None = None

    @property
    def components(self) -> Components:
        """The parts of the run. Raises RuntimeError before `open()` has built them."""
        if self._components is None:
            raise RuntimeError("the run is not open: call run(), or work within `with trainer.open():`")
        return self._components

    def build(self, world: World, monitor: Monitor) -> dict[str, Stateful]:
        self.inputs.rewards.print_to(self.folder.rewards_log)
        if self.inputs.environments is not None:
            self.inputs.environments.print_to(self.folder.rewards_log)
        self._components = build_components(self.config, self.inputs, world)
        for text in warnings(self.config, self.inputs):
            monitor.warn(text)
        self._components.learner.detail = monitor.detail
        monitor.expect(partial(seconds_per_step, self.config, self.inputs, world.size))
        offline = self.inputs.offline
        self.cursor.data = digest(self.inputs.train.prompts, () if offline is None else offline.groups)
        return {"cursor": self.cursor, **self._components.stateful}

    def run_resources(self) -> AbstractContextManager[object]:
        return closing(self.inputs.rewards)

    def record(self, world: World) -> AbstractContextManager[Monitor]:
        shown, texts = self.config.monitor.samples_per_step, TokenTexts(self.inputs.tokenizer)
        return recording(self.folder, self.config, world, samples_per_step=shown, texts=texts)

    def training_resources(self) -> AbstractContextManager[object]:
        return closing(self.components.engine)

    def sync(self) -> None:
        self.components.sync.push(self.components.engine, version=self.cursor.steps_done)

    def prepare(self) -> None:
        with self.monitor.phase("prepare"):
            for prepare in self.components.preparations:
                self.running.interrupt.check()
                self.monitor.note(prepare())

    @property
    def is_within_step(self) -> bool:
        return self.components.buffer.experience is not None

    def inspect(self, metrics: Metrics) -> tuple[Metrics, list[str]]:
        return self.components.perception_watch.look(metrics)

    @property
    def ends_early(self) -> bool:
        return self.components.perception_watch.stops

    def step(self) -> Metrics:
        """One step: rollouts and rewards (unless the buffer has those of an interrupted step), updates,
        weight sync.
        """
        components, cursor = self.components, self.cursor
        in_force = self._follow_schedules()
        resumes = self.is_within_step
        if not resumes:
            self._fill()
        components.engine.release()
        self._learn()
        if resumes:
            self.monitor.learned_later(cursor.steps_done + 1, components.learner.entropy)
        else:
            self.monitor.learned(components.learner.entropy)
        cursor.steps_done += 1
        twin = components.learner.twin
        swapped = {} if twin is None else twin.after(cursor.steps_done)
        self.monitor.phase("sync")
        iterate = components.iterate
        if iterate is not None and iterate.after(cursor.steps_done):
            iterate.check(components.sync.prompt, self.world, tolerance=components.sync.tolerance)
        components.sync.push(components.engine, version=cursor.steps_done)
        components.prefetch.settle()
        metrics = self.world.merge(components.buffer.empty()) | in_force
        return metrics | swapped | components.kl.adapt(metrics) | components.learner.warmup.adapt(metrics)

    def _follow_schedules(self) -> Metrics:
        """Learns this step with the numbers that are in force in it; they are its metrics."""
        components, step = self.components, self.cursor.steps_done
        numbers = self.config.numbers_in_force(step)
        if numbers:
            algorithm = self.config.build_algorithm(step)
            components.learner.algorithm = components.experience.algorithm = algorithm
            components.experience.scaler.scaling = algorithm.reward_scaling
            components.kl.follow(algorithm.kl)
        return {f"schedule/{key}": Max(number) for key, number in numbers.items()}

    def _fill(self) -> None:
        """Samples and scores the experience of this step and puts it into the buffer.

        The state that a checkpoint holds changes only at the end, so that an interruption loses nothing.
        """
        components, cursor = self.components, self.cursor
        hooks = Hooks(
            cursor.steps_done, self.monitor.phase, self.running.interrupt.check, self.monitor.detail
        )
        collected = components.prefetch.current(lambda: components.collector.begin(cursor.position, hooks))
        self.agree_to_stop()
        pending = None
        if components.prefetch.steps and hooks.step + 1 < self.config.steps:
            pending = components.collector.begin(collected.position, replace(hooks, step=hooks.step + 1))
        self.monitor.phase("learn")
        groups, age = components.prefetch.mask_stale_tokens(collected.groups, version=hooks.step)
        groups, paired = components.pairing(groups)
        section, seed = self.config.learner, self.config.seed
        dealt, numbers = deal(groups, self.world, section, seed=seed, step=hooks.step)
        experience = components.experience.build(
            dealt, kl_coef=components.kl.value, step=hooks.step, group_numbers=numbers
        )
        cursor.position = collected.position
        components.prefetch.next(pending)
        self.monitor.samples(hooks.step + 1, dealt, experience)
        measured = collected.metrics | age | paired
        observed = components.budgets.observe(collected.sampled) | components.constraints.observe(
            collected.sampled
        )
        components.buffer.fill(experience, measured | observed | components.learner.before(experience))

    def _learn(self) -> None:
        buffer, step = self.components.buffer, self.cursor.steps_done
        assert buffer.experience is not None
        self.monitor.phase("learn")
        for metrics in self.components.learner.updates(
            buffer.experience,
            step=step,
            seed=self.config.seed,
            kl_coef=self.components.kl.value,
            done=buffer.updates,
            entropy=buffer.entropy,
        ):
            buffer.entropy = self.components.learner.entropy
            buffer.advance(metrics)
            # raises only on a single rank: a checkpoint holds the buffer of one rank, so that several ranks
            # stop between two steps
            self.running.interrupt.check()

    def evaluate(self) -> float | None:
        """The score on the held-out prompts and pairs, by which checkpoints are compared."""
        held_out, pairs, step = self.inputs.eval, self.components.pair_evaluation, self.cursor.steps_done
        if held_out is None and pairs is None:
            return None
        result, detail = None, self.monitor.detail
        with self.monitor.phase("eval"):
            # only the evaluation before step 1 can be interrupted; a later one would be lost on resume
            between = self.running.interrupt.check if step == 0 else None
            if held_out is not None:
                sampler = self.components.sampler
                result = evaluate(sampler, held_out, self.config, self.world, step, between, detail)
            if pairs is not None:
                result = with_pairs(result, pairs.evaluate(between, detail), step)
        assert result is not None
        if self.world.is_main:
            self.monitor.evaluated(asdict(result))
        return result.score

    def finish(self) -> None:
        if self.inputs.environments is not None:
            self.inputs.environments.close()
        policy, path, exports = self.components.policy, self.folder.path, self.config.checkpoint.export
        if not self.world.is_main:
            # a sharded model is gathered by all ranks together
            for _ in gathered(policy.rollout_model) if exports else ():
                pass
            return
        with self.monitor.phase("export"):
            # first, so that it is there whatever becomes of the export
            write_report(self.folder)
            if exports:
                reader = Reader(self.config.model.path, self.inputs.tokenizer)
                store.export(as_whole(policy.rollout_model), reader, path / "model")
                if policy.adapter is not None:
                    store.export(policy.adapter, reader, path / "adapter")
        self.monitor.close()
        self.monitor.note(closing_summary(self.folder))
