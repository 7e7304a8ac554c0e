"""`EnvironmentPool`: the environments of a run, in processes that can be killed (protocol.py says their use).

Each process holds many episodes, and each episode has a thread in it (worker.py). A function that raises, an
answer that is too large, and a call that is too slow cost their own episode. Only what ends the process (a
crash, too much memory, too many processes, a function that never returns to Python) costs the other episodes
in it, with `isolation: episode` none. The next `begin` starts a new process.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.config.environment import EnvironmentConfig
from rlhf.environments.holder import Held, Holder
from rlhf.environments.process import Description, EnvironmentProcess, ForkedProcess, Template
from rlhf.environments.protocol import Ending, Lost, Message, Reply
from rlhf.environments.spec import EnvironmentSpec
from rlhf.plugins import absolute
from rlhf.rewards.signature import did_you_mean
from rlhf.rewards.workers.kept import StartError, WorkerLost
from rlhf.rewards.workers.pool import print_to, share_of_cores

MOST_FAILED_STARTS = 3
"""Processes in a row that could not be started, after which `begin` raises."""


class EnvironmentPool:
    """Implements `protocol.Environments`. May be used from several threads."""

    def __init__(self, config: EnvironmentConfig, log: Callable[[str], None] = lambda text: None) -> None:
        """Starts a process and waits until it has loaded the environments. `log` gets what they print.

        Raises StartError, which names the environment, when one cannot be loaded, and ValueError when a file
        does not exist or nothing is named.
        """
        if not config.path:
            raise ValueError("environment.path names no environment")
        self.spec = spec_of(config)
        self.log = log
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._episodes: dict[str, Held] = {}
        self._holders: list[Holder] = []
        self._failed: list[StartError] = []
        """Of the starts since the last that went well."""
        self._template: Template | None = None
        """The process that is forked for each episode, with `isolation: episode`."""
        self._template_lock = threading.Lock()
        started = self._new()
        described = started.ready(self._who)
        self._described: dict[str, Description] = {one.name: one for one in described}
        known = {key: schema for one in described for key, schema in one.by_function.items()}
        self.spec = replace(self.spec, schemas=known)
        if isinstance(started, Template):
            self._template = started
        else:
            self._holders.append(self._started(lambda: started))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the environments: of their classes, or of the functions that are tools."""
        return tuple(self._described)

    @property
    def gives_rewards(self) -> bool:
        return any(one.gives_rewards for one in self._described.values())

    def tools(self, name: str) -> Sequence[Mapping[str, Any]]:
        return self._described[name].schemas

    def name_for(self, columns: Mapping[str, Any]) -> str:
        """As TRL, one reads the column `environment` only where there are several. Raises ValueError."""
        if len(self._described) == 1:
            return self.names[0]
        name = columns.get("environment")
        if name not in self._described:
            raise ValueError(
                f"the column 'environment' must name one of {', '.join(self.names)}, got {name!r:.80}"
                f"{did_you_mean(str(name), self.names)}"
            )
        return str(name)

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raises ValueError when a `reset` needs a column that a dataset with `columns` does not have."""
        for one in self._described.values():
            missing = [name for name in one.requires if name not in columns]
            if missing:
                raise ValueError(
                    f"reset of environment {one.name} needs the column {missing[0]!r}"
                    f"{did_you_mean(missing[0], columns)}, which the dataset does not have; its columns: "
                    f"{', '.join(columns) or 'none beside the prompt'}"
                )

    def begin(
        self,
        key: str,
        name: str,
        columns: Mapping[str, Any],
        seed: int,
        finish: Callable[[Reply | Lost], None],
    ) -> None:
        """As the protocol says. Raises StartError when MOST_FAILED_STARTS starts in a row have failed."""
        assert name in self._described, f"there is no environment {name!r}"
        with self._lock:
            assert key not in self._episodes, f"episode {key!r} has begun already"
            holder = self._holder()
            held = Held(next(self._numbers), name, holder)
            arguments = {"name": name, "columns": dict(columns), "seed": seed}
            holder.ask(held, "begin", arguments, self._unless_lost(key, held, finish))
            self._episodes[key] = held

    def respond(self, key: str, messages: Sequence[Message], finish: Callable[[Reply | Lost], None]) -> None:
        with self._lock:
            held = self._episodes[key]
            arguments = {"messages": [dict(message) for message in messages]}
            held.holder.ask(held, "respond", arguments, self._unless_lost(key, held, finish))

    def end(self, key: str, messages: Sequence[Message], finish: Callable[[Ending | Lost], None]) -> None:
        with self._lock:
            held = self._episodes.pop(key)
            held.holder.ask(held, "end", {}, finish)

    def drop(self, key: str) -> None:
        with self._lock:
            held = self._episodes.pop(key, None)
            if held is not None:
                held.holder.drop(held)

    def close(self) -> None:
        with self._lock:
            holders, self._holders = self._holders, []
            for holder in holders:
                holder.close()
        for holder in holders:
            holder.thread.join()
        with self._template_lock:
            if self._template is not None:
                self._template.end()
                self._template = None

    def _unless_lost(self, key: str, held: Held, finish: Callable[[Any], None]) -> Callable[[Any], None]:
        """`finish`, and a lost episode has no key any more, so that the key may begin again."""

        def told(outcome: Any) -> None:
            if isinstance(outcome, Lost):
                with self._lock:
                    if self._episodes.get(key) is held:
                        del self._episodes[key]
            finish(outcome)

        return told

    def _holder(self) -> Holder:
        """The process for a new episode: the one with the fewest, or a new one while there may be more."""
        if len(self._failed) >= MOST_FAILED_STARTS:
            raise self._failed[-1]
        self._holders = [h for h in self._holders if not h.is_retired or h.thread.is_alive()]
        if self.spec.is_alone:
            holder = self._added()
            # it takes no other episode
            holder.is_retired = True
            return holder
        open_ones = [holder for holder in self._holders if not holder.is_retired]
        if open_ones and (len(open_ones) >= self.spec.workers or not all(h.held for h in open_ones)):
            return min(open_ones, key=lambda holder: len(holder.held))
        return self._added()

    def _added(self) -> Holder:
        holder = self._started(self._make)
        self._holders.append(holder)
        return holder

    @property
    def _who(self) -> str:
        return f"environment {self.spec.path}"

    def _new(self) -> EnvironmentProcess | Template:
        """A process that loads the environments."""
        return (Template if self.spec.is_alone else EnvironmentProcess)(self.spec, self._print)

    def _make(self) -> EnvironmentProcess:
        """Runs in the thread of a holder."""
        try:
            process = self._forked() if self.spec.is_alone else EnvironmentProcess(self.spec, self._print)
            process.ready(self._who)
        except StartError as error:
            self._failed.append(error)
            raise
        self._failed.clear()
        return process

    def _forked(self) -> EnvironmentProcess:
        """A process forked from the template, which is started again if it is gone."""
        with self._template_lock:
            if self._template is not None:
                try:
                    return ForkedProcess(self.spec, self._print, self._template)
                except WorkerLost:
                    self._template = None
            template = Template(self.spec, self._print)
            template.ready(self._who)
            self._template = template
            return ForkedProcess(self.spec, self._print, template)

    def _started(self, make: Callable[[], EnvironmentProcess]) -> Holder:
        holder = Holder(make, self.spec, self._lock)
        holder.thread.start()
        return holder

    def print_to(self, path: Path) -> None:
        self.log = partial(print_to, path, "environment")

    def _print(self, text: str) -> None:
        self.log(text)


def spec_of(config: EnvironmentConfig) -> EnvironmentSpec:
    """The settings of the section `environment`. Raises ValueError when a file does not exist."""
    return EnvironmentSpec(
        paths=tuple(absolute(path) for path in config.path),
        params=config.params,
        calls=absolute(config.calls) if ":" in config.calls else config.calls,
        timeout=config.timeout,
        workers=config.workers or share_of_cores(),
        memory_gib=config.memory_gib,
        variables=config.variables,
        is_alone=config.isolation == "episode",
    )
