"""Training a policy: roll out, score, learn, sync. `loop.py` goes over the steps, `components.py` builds."""

from __future__ import annotations

from contextlib import AbstractContextManager, closing
from dataclasses import asdict, replace
from typing import ClassVar

from rlhf.checkpoints import store
from rlhf.checkpoints.stateful import Stateful
from rlhf.collect.sampler import Hooks
from rlhf.components import Components, build_components
from rlhf.config.run import Config
from rlhf.distributed.world import World, world_size
from rlhf.evaluation.accuracy import evaluate
from rlhf.learn.dealing import deal
from rlhf.loop import Loop
from rlhf.metrics import Metrics
from rlhf.models.sharding import as_whole, gathered
from rlhf.monitoring.monitor import Monitor
from rlhf.monitoring.recording import recording
from rlhf.monitoring.report.summary import closing_summary, write_report
from rlhf.monitoring.samples import TokenTexts
from rlhf.preflight.describe import warnings
from rlhf.preflight.load import load_inputs


class Trainer(Loop[Config]):
    """One run. `Trainer(config).run()` is all that `train.py` does."""

    throughput: ClassVar[tuple[str, str]] = ("throughput/tokens_per_second", "rollout/tokens")

    def __init__(self, config: Config) -> None:
        """Reads everything but the weights. Raises ValueError for bad input."""
        super().__init__(config, timeout=config.distributed.timeout)
        self.inputs = load_inputs(config, world_size=world_size())
        self._components: Components | None = None

    @property
    def components(self) -> Components:
        """Raises RuntimeError outside `open()`."""
        if self._components is None:
            raise RuntimeError("nothing is built yet: call run(), or use what is built within `with open():`")
        return self._components

    def build(self, world: World, monitor: Monitor) -> dict[str, Stateful]:
        self.inputs.rewards.print_to(self.folder.rewards_log)
        self._components = build_components(self.config, self.inputs, world)
        for text in warnings(self.config, self.inputs):
            monitor.warn(text)
        return {"cursor": self.cursor, **self._components.stateful}

    def resources(self) -> AbstractContextManager[object]:
        return closing(self.inputs.rewards)

    def record(self, world: World) -> AbstractContextManager[Monitor]:
        shown, texts = self.config.monitor.samples_per_step, TokenTexts(self.inputs.tokenizer)
        return recording(self.folder, self.config, world, samples_per_step=shown, texts=texts)

    def engine(self) -> AbstractContextManager[object]:
        return closing(self.components.engine)

    def sync(self) -> None:
        self.components.sync.push(self.components.engine, version=self.cursor.steps_done)

    def prepare(self) -> None:
        with self.monitor.phase("prepare"):
            for prepare in self.components.preparations:
                self.running.interrupt.check()
                self.monitor.note(prepare())

    def shown_step(self) -> int:
        return self.cursor.steps_done + (self.components.buffer.experience is not None)

    def look(self, metrics: Metrics) -> tuple[Metrics, list[str]]:
        return self.components.perception_watch.look(metrics)

    @property
    def ends_early(self) -> bool:
        return self.components.perception_watch.stops

    def step(self) -> Metrics:
        """One round: rollouts and rewards, unless the buffer has some left; updates, weight sync."""
        components, cursor = self.components, self.cursor
        if components.buffer.experience is None:
            self._fill()
        components.engine.release()
        self._learn()
        self.monitor.learned(components.learner.entropy)
        cursor.steps_done += 1
        self.monitor.phase("sync")
        components.sync.push(components.engine, version=cursor.steps_done)
        components.prefetch.settle()
        metrics = self.world.merge(components.buffer.empty())
        return metrics | components.kl.adapt(metrics) | components.learner.warmup.adapt(metrics)

    def _fill(self) -> None:
        """Samples and scores what this step learns from. The memory of the parts changes only at its end."""
        components, cursor = self.components, self.cursor
        hooks = Hooks(cursor.steps_done, self.monitor.phase, self.running.interrupt.check)
        collected = components.prefetch.current(lambda: components.collector.begin(cursor.position, hooks))
        self.agree_to_stop()
        pending = None
        if components.prefetch.steps and hooks.step + 1 < self.config.steps:
            pending = components.collector.begin(collected.position, replace(hooks, step=hooks.step + 1))
        self.monitor.phase("learn")
        groups, age = components.prefetch.mask_stale_tokens(collected.groups, version=hooks.step)
        section, seed = self.config.learner, self.config.seed
        dealt, numbers = deal(groups, self.world, section, seed=seed, step=hooks.step)
        experience = components.experience.build(
            dealt, kl_coef=components.kl.value, step=hooks.step, group_numbers=numbers
        )
        cursor.position = collected.position
        components.prefetch.next(pending)
        self.monitor.samples(hooks.step + 1, dealt, experience)
        measured = collected.metrics | age
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
        ):
            buffer.advance(metrics)
            # alone: a checkpoint has the buffer of one rank only, so several stop between two steps
            self.running.interrupt.check()

    def evaluate(self) -> float | None:
        """The accuracy."""
        held_out, step = self.inputs.eval, self.cursor.steps_done
        if held_out is None:
            return None
        with self.monitor.phase("eval"):
            # only the evaluation before step 1 can be interrupted; a later one would be lost on resume
            between = self.running.interrupt.check if step == 0 else None
            result = evaluate(self.components.sampler, held_out, self.config, self.world, step, between)
        if self.world.is_main:
            self.monitor.evaluated(asdict(result))
        return result.accuracy

    def finish(self) -> None:
        policy, path, exports = self.components.policy, self.folder.path, self.config.checkpoint.export
        if not self.world.is_main:
            for _ in gathered(policy.rollout_model) if exports else ():
                pass
            return
        with self.monitor.phase("export"):
            if exports:
                reader = self.inputs.processor or self.inputs.tokenizer
                store.export(as_whole(policy.rollout_model), reader, path / "model")
                if policy.adapter is not None:
                    store.export(policy.adapter, reader, path / "adapter")
            write_report(self.folder)
        self.monitor.close()
        self.monitor.note(closing_summary(self.folder))
