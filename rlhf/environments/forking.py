"""The process that loads the environments once and is forked for each episode (`isolation: episode`).

    trainer --descriptors--> template --fork--> keeper of an episode --fork--> process of the episode

The template runs no function of an environment beyond its import, and has no threads of ours, so it can be
forked. A forked keeper is an ordinary one (rlhf/rewards/workers/keeper.py), with limits of its own; it ends
when the template ends. The process of an episode runs it in its main thread, where signals work.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import threading
from typing import Any

from rlhf.environments.loading import Environment, load
from rlhf.environments.spec import EnvironmentSpec
from rlhf.environments.worker import Answers, Worker, described, loaded
from rlhf.rewards.workers.keeper import supervise

MOST_BYTES = 1 << 16
"""Of the settings of a keeper."""
_environments: dict[str, Environment] = {}
"""The environments of the template, which forked processes find here."""


def serve(connection: int, folder: str) -> None:
    """Runs in the template: loads the environments, then forks a keeper for each request."""
    os.set_inheritable(connection, False)
    with socket.socket(fileno=connection) as trainer:
        answers = Answers(trainer)
        with trainer.makefile("rb", buffering=0) as requests:
            spec: EnvironmentSpec = pickle.load(requests)
        environments = loaded(lambda: load(spec), folder, answers)
        if environments is None:
            return
        _environments.update(environments)
        answers.send_object({"ready": described(environments)})
        while True:
            request, descriptors, _, _ = socket.recv_fds(trainer, MOST_BYTES, 2)
            if not request:
                return
            pid = os.fork()
            if pid == 0:
                _supervise(trainer, json.loads(request), descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            answers.send_object({"forked": pid})
            _reap()


def _supervise(trainer: socket.socket, settings: dict[str, Any], descriptors: list[int]) -> None:
    """In the forked child: becomes the keeper of an episode."""
    status = 1
    try:
        trainer.close()
        os.setsid()
        data, line = descriptors
        supervise({**settings, "passed": [data], "line": line})
        status = 0
    finally:
        os._exit(status)


def _reap() -> None:
    """Forgets the keepers that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def serve_one(connection: int, folder: str) -> None:
    """Runs in the process of an episode: carries out its calls in the main thread."""
    os.set_inheritable(connection, False)
    os.chdir(folder)
    with socket.socket(fileno=connection) as trainer, trainer.makefile("rb") as requests:
        pickle.load(requests)
        answers = Answers(trainer)
        answers.send_object({"ready": []})
        worker = Worker(_environments, answers, is_alone=True)

        def read() -> None:
            while True:
                try:
                    worker.take(*pickle.load(requests))
                except EOFError:
                    os._exit(0)

        threading.Thread(target=read, daemon=True).start()
        worker.run_alone()
