"""Output that a reward function prints before it returns is logged line by line, however slow the keeper."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.workers.keeper import OUTPUT_LIMIT, Keeper
from rlhf.rewards.workers.kept import WorkerLost
from rlhf.rewards.workers.process import WorkerProcess

LINES = 2000
FUNCTION = f"""
def chatty(completions, **_):
    for i in range({LINES}):
        print("line", i)
    print("the last", end="")
    return [0.0] * len(completions)


def stuck(completions, **_):
    print("the last", end="")
    while True:
        pass
"""


class Kept:
    """A keeper in this process; the test plays its worker."""

    def __init__(self) -> None:
        output, self.printed = os.pipe()
        self.trainer, line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.trainer.setblocking(False)
        self.keeper = Keeper(0, {"line": line.detach(), "memory": 0, "processes": 0}, output)

    def print(self, text: bytes) -> None:
        os.write(self.printed, text)
        self.keeper._read_output()
        self.keeper._pass_on()

    def heard(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        try:
            while event := self.trainer.recv(1 << 18):
                events.append(json.loads(event))
        except BlockingIOError:
            pass
        return events

    def close(self) -> None:
        for descriptor in (self.printed, self.keeper.output, self.keeper.line):
            os.close(descriptor)
        self.trainer.close()


@pytest.fixture
def kept() -> Iterator[Kept]:
    kept = Kept()
    yield kept
    kept.close()


def test_a_line_that_is_printed_in_pieces_is_passed_on_whole(kept: Kept) -> None:
    for piece in ("scored", " ", "grün ".encode()[:3], "grün ".encode()[3:], "7"):
        kept.print(piece if isinstance(piece, bytes) else piece.encode())
        assert kept.heard() == []
    kept.print(b"\nand")
    assert kept.heard() == [{"output": "scored grün 7\n"}]
    kept.keeper.report("it exited")
    unfinished, ended = kept.heard()
    assert unfinished == {"output": "and"} and ended["ended"] == "it exited" and ended["dropped"] == 0


def test_a_line_without_an_end_is_passed_on_in_pieces(kept: Kept) -> None:
    for _ in range(5):
        kept.print(b"x" * 10_000)
    assert [len(event["output"]) for event in kept.heard()] == [1 << 14] * 3


def test_what_the_trainer_does_not_read_waits_and_no_more_than_the_limit_is_kept(kept: Kept) -> None:
    line = b"a line of thirty-two characters\n"
    for _ in range(OUTPUT_LIMIT // len(line) + 10):
        kept.print(line)
    assert kept.keeper.waiting, "the socket holds less than that"
    heard: list[str] = []
    while some := kept.heard():
        heard += [event["output"] for event in some]
        kept.keeper._pass_on()
    assert "".join(heard).encode() == line * (OUTPUT_LIMIT // len(line))
    assert kept.keeper.dropped == 10 * len(line)


def test_a_trainer_that_is_gone_is_not_waited_for(kept: Kept) -> None:
    kept.print(b"words")
    kept.trainer.close()
    kept.keeper.report("it exited")
    assert not kept.keeper.is_connected


@pytest.mark.parametrize("function", ["chatty", "stuck"])
def test_the_last_words_are_heard_through_a_keeper_that_lags_behind(tmp_path: Path, function: str) -> None:
    """On a busy machine a worker may have answered, or must be killed, before its keeper has read."""
    (tmp_path / "mine.py").write_text(FUNCTION)
    heard: list[str] = []
    spec = RewardSpec(f"{tmp_path / 'mine.py'}:{function}", timeout=1 if function == "stuck" else 60)
    worker = WorkerProcess(function, spec, heard.append)
    worker.ready()
    keeper = worker._keeper.pid
    os.kill(keeper, signal.SIGSTOP)
    # by then the code that ends the worker is waiting for its keeper
    goes_on = threading.Timer(3.0, os.kill, (keeper, signal.SIGCONT))
    goes_on.start()
    try:
        if function == "stuck":
            with pytest.raises(WorkerLost, match="too slow") as lost:
                list(worker.run([{"completions": ["x"]}], is_async=False))
            assert lost.value.output.startswith("the last")
        else:
            ((_, answer),) = worker.run([{"completions": ["x"]}], is_async=False)
            assert answer["scores"] == [{function: 0.0}]
            worker.end()
    finally:
        goes_on.join()
    said = "".join(heard).splitlines()
    if function == "chatty":
        assert said == [*(f"line {i}" for i in range(LINES)), "the last"]
    else:
        assert said[0].startswith("the last")
