"""A process for each episode; starts that fail; what the trainer is told."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from rlhf.config.environment import EnvironmentConfig
from rlhf.environments.pool import MOST_FAILED_STARTS, EnvironmentPool
from rlhf.environments.protocol import Ending, Lost, Reply
from rlhf.rewards.workers.keeper import descendants
from rlhf.rewards.workers.kept import StartError
from tests.environments.asking import PATIENCE, begin, call, contents, end, pool_of, start_turn, turn
from tests.environments.test_hostile import HOSTILE, do


def test_with_a_process_each_an_episode_is_lost_alone_and_repeatable() -> None:
    others = set(descendants(os.getpid()))
    with pool_of(HOSTILE, isolation="episode", memory_gib=0.5) as pool:
        for key in ("crash", "beside", "memory_hog_of_children", "fine", "seeded"):
            assert begin(pool, key, "Hostile", seed=7) == Reply()
        lost = {what: start_turn(pool, what, do(what)) for what in ("crash", "memory_hog_of_children")}
        messages = {what: answer.wait() for what, answer in lost.items()}
        assert messages["crash"] == Lost(
            "died",
            "environment Hostile: its process is gone: it was killed by SIGSEGV",
            messages["crash"].details,
        )
        assert messages["memory_hog_of_children"].kind == "memory"
        # an episode has the main thread of its process, and the generators for itself
        assert contents(turn(pool, "fine", do("set_a_signal_handler") + do("raise_error"))) == [
            "null",
            '{"error": "ValueError: Game over."}',
        ]
        first, second = end(pool, "fine"), end(pool, "seeded")
        assert isinstance(first, Ending)
        assert first == second
        assert begin(pool, "other", "Hostile", seed=8) == Reply()
        assert end(pool, "other") != first

        # whatever ends the process that is forked: it is started again
        assert pool._template is not None
        thread = pool._episodes["beside"].holder.thread
        os.kill(pool._template._keeper.pid, signal.SIGKILL)
        thread.join(PATIENCE)
        gone = turn(pool, "beside", call("fine"))
        assert isinstance(gone, Lost)
        assert gone.kind == "died"
        assert begin(pool, "again", "Hostile") == Reply()
    assert set(descendants(os.getpid())) - others == set()


def test_an_environment_that_cannot_be_loaded_is_named_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import missing_package\nclass Mine: ...")
    with pytest.raises(StartError) as refused:
        EnvironmentPool(EnvironmentConfig(path=(f"{file}:Mine",)))
    assert str(refused.value) == (
        f"environment {file}:Mine cannot be loaded: ModuleNotFoundError: No module named 'missing_package'\n"
        f'  File "{file}", line 1, in <module>\n'
        "    import missing_package\n"
        "ModuleNotFoundError: No module named 'missing_package'"
    )
    with pytest.raises(ValueError, match="there is no file"):
        EnvironmentPool(EnvironmentConfig(path=(f"{tmp_path}/none.py:Mine",)))


def test_too_many_starts_that_fail_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    good = (
        "import os\n"
        "class Mine:\n"
        "    def reset(self, start, **more):\n"
        "        return os.environ.get(start) and os.environ['MY_SERVICE_KEY']\n"
        "    def respond(self, messages): ...\n"
    )
    file.write_text(good)
    monkeypatch.setenv("MY_SERVICE_KEY", "secret")
    printed: list[str] = []
    pool = EnvironmentPool(EnvironmentConfig(path=(f"{file}:Mine",), workers=1), printed.append)
    try:
        pool.check_columns(["prompt", "start"])
        with pytest.raises(
            ValueError, match=r"reset of environment Mine needs the column 'start' \(did you mean"
        ):
            pool.check_columns(["prompt", "starts"])
        assert pool.name_for({"environment": "other"}) == "Mine"
        without = begin(pool, "one", "Mine", columns={"start": "PATH"})
        assert isinstance(without, Lost)
        assert without.message == (
            "environment Mine raised KeyError: 'MY_SERVICE_KEY'\n"
            "MY_SERVICE_KEY is set here, but environments get the environment variables that their settings "
            "name, no others: add variables: [MY_SERVICE_KEY] to this environment"
        )
        assert begin(pool, "one", "Mine", columns={"start": "NOT_SET"}) == Reply()
        file.write_text(f"print('Starting.')\nraise RuntimeError('the license has run out')\n{good}")
        pool._episodes["one"].holder.close()
        for _ in range(MOST_FAILED_STARTS):
            lost = begin(pool, "two", "Mine", columns={"start": "NOT_SET"})
            assert isinstance(lost, Lost)
            assert "RuntimeError: the license has run out" in lost.message
        with pytest.raises(StartError, match=r"mine\.py:Mine cannot be loaded: RuntimeError: the license"):
            begin(pool, "two", "Mine")
        assert "".join(printed) == "Starting.\n" * MOST_FAILED_STARTS
    finally:
        pool.close()
