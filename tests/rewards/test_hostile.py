"""Misbehaving reward functions: only their sample is masked, the function is named, no process is left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.metrics import Mean
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.scoring import Rewards, Scoring
from rlhf.rewards.signature import Signature
from rlhf.rewards.workers import environment
from rlhf.rewards.workers.keeper import descendants
from rlhf.rewards.workers.pool import Call, RewardError, WorkerPool
from rlhf.rewards.workers.process import WorkerProcess
from rlhf.types import Completion, FinishReason, Prompt, VersionSpan

ROOT = Path(__file__).parents[2]
HOSTILE = str(Path(__file__).with_name("hostile.py"))
TIMEOUT = 1.0
"""Of functions that are to be too slow."""
PATIENCE = 60.0
"""Of all others: on a busy machine anything may take a while."""
ENOUGH = 8
"""Well-behaved samples beside one that is not."""


def spec(name: str, **changes: Any) -> RewardSpec:
    settings: dict[str, Any] = {"timeout": PATIENCE, "workers": 1, "memory_gib": 0.5, "processes": 64}
    return RewardSpec(f"{HOSTILE}:{name}", **(settings | changes))


def made(name: str, max_failed_share: float = 0.1, **changes: Any) -> AbstractContextManager[Rewards]:
    return _closing(Rewards([spec(name, **changes)], (), max_failed_share=max_failed_share))


def made_of(
    path: str, columns: Sequence[str] = (), max_failed_share: float = 0.5, **settings: Any
) -> AbstractContextManager[Rewards]:
    """Rewards with a single function, given by its path or built-in name."""
    return _closing(Rewards([RewardSpec(path, **settings)], columns, max_failed_share=max_failed_share))


@contextmanager
def _closing(rewards: Rewards) -> Iterator[Rewards]:
    try:
        yield rewards
    finally:
        rewards.close()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def submit(
    rewards: Rewards, texts: Sequence[str], step_samples: int | None = None, **columns: Any
) -> Scoring:
    spans = (VersionSpan(0, 0, 1),)
    completions = [
        Completion("a.jsonl:1", i, (1,), (0.0,), FinishReason.STOP, spans) for i in range(len(texts))
    ]
    prompts = [Prompt("a.jsonl:1", (1,), "Why?", columns)]
    return rewards.submit(prompts, [completions], [texts], trainer_state={}, step_samples=step_samples)


def given(scoring: Scoring) -> list[float | None]:
    return [trajectory.reward for trajectory in scoring.result()[0][0].trajectories]


def causes(scoring: Scoring) -> list[tuple[int, str, str]]:
    """Sample, kind and message of each failure."""
    return [(place, failure.kind, failure.message) for place, failure in scoring.by_function[0].failures]


@pytest.fixture(scope="module")
def others() -> set[int]:
    """Processes below this one that earlier tests left; no reward function started them."""
    return set(descendants(os.getpid()))


def settle(count: int, others: set[int]) -> set[int]:
    """The new processes below this one, once there are at most `count`, or after some time."""
    deadline = time.monotonic() + PATIENCE
    while len(left := set(descendants(os.getpid())) - others) > count and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


@pytest.fixture(scope="module")
def impatient(others: set[int]) -> Iterator[Rewards]:
    """Shared by all tests with short deadlines: each finds the workers as the one before left them."""
    with made("misbehave", max_failed_share=0.2, timeout=TIMEOUT) as rewards:
        yield rewards


@pytest.fixture(scope="module")
def patient(others: set[int]) -> Iterator[Rewards]:
    """For tests that are not about deadlines."""
    with made("misbehave", max_failed_share=0.2) as rewards:
        yield rewards


SLOW = f"it took longer than {TIMEOUT:g} s"
CASES = {
    "loop": SLOW,
    "loop_in_c": SLOW,
    "loop_ignoring_signals": SLOW,
    "sleep": SLOW,
    "stop_itself": SLOW,
    "deadlock": SLOW,
    "read_standard_input": SLOW,
    "orphan": SLOW,
    "memory_hog": "MemoryError",
    "memory_hog_of_children": r"it and its processes held 0.\d GiB, more than the 0.5 GiB allowed",
    "recursion": "RecursionError",
    "stack_overflow_in_c": "it was killed by SIGSEGV",
    "fork_bomb": r"it had \d+ processes, more than the 64 allowed",
    "fork_bomb_in_sessions": r"it had \d+ processes, more than the 64 allowed",
    "segfault": "it was killed by SIGSEGV",
    "abort": "it was killed by SIGABRT",
    "exit_at_once": "it exited with status 0",
    "exit_politely": "SystemExit: enough",
    "kill_itself": "it was killed by SIGKILL",
    "kill_its_keeper": "its supervisor process is gone",
    "kill_its_group": "it was killed by SIGKILL",
    "print_megabytes": "ValueError: enough written",
    "close_every_file": "it exited with status 1",
    "garble_the_connection": "it sent something that is not an answer",
    "forge_an_answer": "it sent something that is not an answer",
    "flood_the_connection": "it sent an answer of more than 16 MiB",
    "raise_what_cannot_be_printed": r"Unprintable: <exception str\(\) failed>",
    "raise_megabytes": "ValueError: zzz",
    "raise_base_exception": "BaseException: not an Exception",
    "interrupt": "KeyboardInterrupt",
    "leak_threads": "SystemExit: 1",
    "lower_its_limits": "MemoryError",
    "remove_its_folder": "FileNotFoundError",
    "disable_everything": "ValueError: after clearing the modules",
}


@pytest.mark.parametrize("behaviour", CASES)
def test_what_a_function_does_costs_its_own_sample_and_no_other(
    impatient: Rewards, patient: Rewards, others: set[int], behaviour: str
) -> None:
    rewards = impatient if CASES[behaviour] == SLOW else patient
    scoring = submit(rewards, ["fine"] * 3 + [behaviour] + ["fine"] * (ENOUGH - 3))
    assert given(scoring) == [1.0] * 3 + [None] + [1.0] * (ENOUGH - 3)
    ((place, kind, message),) = causes(scoring)
    assert place == 3
    assert re.match(CASES[behaviour], message), message
    assert (kind == "timeout") == (CASES[behaviour] == SLOW)
    # a keeper and a worker for each of the two functions
    assert len(settle(4, others)) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nan", "nan"),
        ("infinite", "-inf"),
        ("huge", "1000"),
        ("beyond float32", "-1e+39"),
        ("nan in dict", "{'good': 1.0, 'bad': nan}"),
    ],
)
def test_what_is_no_finite_number_masks_the_sample(text: str, message: str) -> None:
    with made("values", max_failed_share=0.5) as rewards:
        scoring = submit(rewards, ["fine", text])
        assert given(scoring) == [1.0, None]
        ((place, kind, said),) = causes(scoring)
        assert (place, kind) == (1, "value")
        assert said.startswith(message)


@pytest.mark.parametrize("text", ["none", "empty dict", "dict of none"])
def test_what_is_none_does_not_apply(text: str) -> None:
    with made("values", max_failed_share=0.5) as rewards:
        scoring = submit(rewards, ["fine", text])
        assert given(scoring) == [1.0, None]
        assert causes(scoring) == []


@pytest.mark.parametrize(
    ("function", "text", "message"),
    [
        ("values", "text", "got str 'good'"),
        ("values", "bytes", "got bytes b'1'"),
        ("values", "complex", "got complex 1j"),
        ("values", "nested", r"must return for each step where it ends in the text, .* got 1.0"),
        ("values", "object", "got object <object object"),
        ("values", "number as key", "must name objectives by text"),
        ("values", "text in dict", "got str '1'"),
        ("shapes", "too many", "must return 1 values, one a completion, got 2"),
        ("shapes", "none at all", "got 0"),
        ("shapes", "a number", "must return a list of 1 values, one a completion, got float"),
        ("shapes", "nothing", "got NoneType None"),
        ("shapes", "a text", "got str '1.0'"),
        ("shapes", "a set", "got set {1.0}"),
        ("shapes", "a dict", "got dict"),
        ("shapes", "an iterator", "got list_iterator"),
    ],
)
def test_what_is_no_reward_stops_the_run_with_the_functions_name(
    function: str, text: str, message: str
) -> None:
    with made(function, max_failed_share=1.0) as rewards:
        with pytest.raises(RewardError, match=f"reward function {function} .*{message}"):
            submit(rewards, ["fine", text]).result()
        assert given(submit(rewards, ["fine"])) == [1.0]


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [("wait", "timeout"), ("loop", "timeout"), ("segfault", "died"), ("exit_politely", "exception")],
)
def test_of_async_calls_under_way_together_one_fails_alone(behaviour: str, kind: str) -> None:
    timeout = TIMEOUT if kind == "timeout" else PATIENCE
    with made("misbehave_async", max_failed_share=0.5, timeout=timeout) as rewards:
        scoring = submit(rewards, ["fine"] * 4 + [behaviour] + ["fine"] * 4)
        assert given(scoring) == [1.0] * 4 + [None] + [1.0] * 4
        assert [(place, k) for place, k, _ in causes(scoring)] == [(4, kind)]


@pytest.mark.parametrize("behaviour", ["loop", "segfault", "raise_base_exception"])
def test_of_a_call_with_several_samples_one_fails_alone(behaviour: str) -> None:
    timeout = TIMEOUT if behaviour == "loop" else PATIENCE
    with made("misbehave", max_failed_share=0.5, batch=4, timeout=timeout) as rewards:
        scoring = submit(rewards, ["fine", "fine", behaviour, "fine", "fine"])
        assert given(scoring) == [1.0, 1.0, None, 1.0, 1.0]


def test_a_group_that_must_be_together_fails_together() -> None:
    with made("misbehave", max_failed_share=1.0, batch="group") as rewards:
        assert given(submit(rewards, ["fine", "segfault"])) == [None, None]
        assert given(submit(rewards, ["fine", "fine"])) == [1.0, 1.0]


def test_a_run_stops_when_too_many_fail_and_before_all_have() -> None:
    with made("misbehave", max_failed_share=0.1, timeout=0.3) as rewards:
        with pytest.raises(RewardError) as raised:
            submit(rewards, ["sleep"] * 40).result()
        assert re.match(
            r"5 of 40 samples have no reward, more than max_failed_share = 0.1: misbehave failed on 5 "
            r"\(it took longer than 0.3 s for a.jsonl:1#0, completion 'sleep'\)",
            str(raised.value),
        )


def test_the_stack_of_a_loop_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with made("misbehave", max_failed_share=1.0, timeout=TIMEOUT) as rewards:
        submit(rewards, ["loop"]).result()
    assert "failed on sample a.jsonl:1#0" in caplog.text
    assert "in loop" in caplog.text
    assert "hostile.py" in caplog.text


def test_parts_of_a_step_are_scored_while_others_are_made() -> None:
    with made("misbehave", max_failed_share=0.2, timeout=TIMEOUT) as rewards:
        parts = [submit(rewards, [text], step_samples=4) for text in ("fine", "sleep", "fine", "fine")]
        with pytest.raises(RewardError, match="1 of 4 samples"):
            rewards.gather(parts)
        parts = [submit(rewards, ["fine"], step_samples=2), submit(rewards, ["fine"], step_samples=2)]
        while not all(part.done for part in parts):
            time.sleep(0.01)
        groups, metrics = rewards.gather(parts)
        assert [t.reward for g in groups for t in g.trajectories] == [1.0, 1.0]
        assert metrics["reward/mean"] == Mean(2.0, 2)


@pytest.mark.parametrize("how", ["close", "forget", "kill -9"])
def test_workers_end_with_the_trainer_however_it_ends(how: str) -> None:
    """The trainer is a separate process here; its worker is busy and has children of its own."""
    script = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.rewards.test_hostile import given, made, spec, submit
from rlhf.rewards import Rewards
from rlhf.rewards.workers.keeper import descendants
from rlhf.rewards.signature import Signature
from rlhf.rewards.workers.pool import Call, WorkerPool
from rlhf.rewards.workers.process import WorkerProcess
rewards = Rewards([spec("misbehave", timeout=60.0, processes=999)], (), max_failed_share=1.0)
submit(rewards, ["fork_bomb_in_sessions"])
while len(pids := list(descendants(os.getpid()))) < 40:
    time.sleep(0.01)
print(*pids, flush=True)
if {how!r} == "close":
    rewards.close()
elif {how!r} == "kill -9":
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == (-9 if how == "kill -9" else 0)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) >= 40
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert alive == []


def test_a_worker_that_has_just_ended_can_be_interrupted() -> None:
    worker = WorkerProcess("one", spec("misbehave"), lambda text: None)
    worker.ready()
    worker.end()
    worker.interrupt()


def test_a_worker_sees_neither_gpus_nor_ranks_and_has_a_folder_of_its_own(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    with made("surroundings", params={"file": str(tmp_path / "seen.json")}) as rewards:
        assert given(submit(rewards, ["fine"])) == [1.0]
        seen = json.loads((tmp_path / "seen.json").read_text())
        assert Path(seen["cwd"]).is_dir()
    assert seen["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert seen["environment"]["OMP_NUM_THREADS"] == "1"
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & seen["environment"].keys()
    assert Path(seen["cwd"]) != Path.cwd()
    assert not Path(seen["cwd"]).exists()
    assert seen["data_limit"] == 1 << 29
    assert seen["is_main_thread"]
    assert not seen["torch"], "a worker that does not need torch must not wait for it"


@pytest.mark.parametrize(
    ("rank", "named", "seen"),
    [("1", None, "1,2,0"), ("1", "4,7,5", "7,5,4"), ("0", "4,7,5", "4,7,5"), ("1", "", None)],
)
def test_each_ranks_workers_see_its_own_gpu_first(
    monkeypatch: pytest.MonkeyPatch, rank: str, named: str | None, seen: str | None
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: named != "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    given = environment.environment(spec("misbehave", gpu=True))
    assert given.get("CUDA_VISIBLE_DEVICES") == (seen if named != "" else "")
    assert environment.environment(spec("misbehave"))["CUDA_VISIBLE_DEVICES"] == ""


def test_a_sample_costs_the_trainer_a_small_part_of_a_millisecond() -> None:
    """Measures CPU time, which does not depend on what else runs; two workers can then be kept busy by a
    reward that takes a millisecond. Runs as a script, because types are not checked there."""
    command = [sys.executable, "-m", "benchmarks.rewards", "--workers", "2", "--repeats", "3"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sleep"]["2"]["trainer_microseconds_a_sample"] < 250


def test_a_step_is_dealt_out_in_few_jobs_that_end_small() -> None:
    """Jobs have many samples at first, so that messages are few, and single samples at the end, so that no
    worker waits long for another."""
    pool = WorkerPool("nothing", spec("misbehave", workers=2))
    pool.signature = Signature(None, (), is_async=False, is_class=False)
    pool._queue.extend(
        [Call((i,), lambda samples: {}, lambda samples, outcome: None, lambda: True) for i in range(1000)]
    )
    sizes: list[int] = []
    while pool._queue:
        sizes.append(len(pool._take()))
    assert sum(sizes) == 1000
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) < 50
    assert sizes[0] == 64
    assert sizes[-4:] == [1] * 4
