"""Generated programs: scored by their tests, isolated as far as the system allows."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from rlhf.rewards.code import CodeReward, program_of
from rlhf.sandbox import runner
from rlhf.sandbox.enclosure import LEVELS
from rlhf.sandbox.runner import Limits, Result, isolation, run_python

LIMITED = LEVELS[-1]
QUICK = Limits(seconds=20.0)
ADD = "```python\ndef add(a, b):\n    return a + b\n```"


def run(code: str, level: str | None = None, limits: Limits = QUICK, **more: str) -> Result:
    return run_python(code, limits, level=level, **more)


def needs_namespaces() -> None:
    if "namespaces" not in isolation():
        pytest.skip("this system allows no namespaces")


def test_the_last_block_is_the_program_and_without_one_all_of_it() -> None:
    assert program_of("```python\nx = 1\n```\nbetter:\n```\nx = 2\n```\n") == "x = 2\n"
    assert program_of("x = 3") == "x = 3"


@pytest.mark.parametrize(
    "language", ["python", "python3", "Python", "PY", "py3", "python3.11", "", " python", "python title=a"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_fence_of_any_spelling_is_a_fence(language: str, end: str) -> None:
    lines = [f"```{language}", "if True:", "    x = 1", "```", "Done."]
    assert program_of(end.join(lines)) == "if True:\n    x = 1\n"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("1. Here:\n   ```python\n   if True:\n       x = 1\n   ```\n", "if True:\n    x = 1\n"),
        ("- ```python\n  x = 1\n  ```", "x = 1\n"),
        ("so ```python\nx = 1\n``` is it", "x = 1\n"),
        ("```python\nx = 1```", "x = 1\n"),
        ("~~~python\nx = 1\n~~~", "x = 1\n"),
        ("````python\nx = '```'\n````", "x = '```'\n"),
        ("```bash\nls\n```\nthen\n```python\nx = 1\n```\n```text\n1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nand\n```python\nx = 2", "x = 1\n"),
    ],
)
def test_where_a_block_begins_and_ends(text: str, program: str) -> None:
    assert program_of(text) == program


def test_much_output_and_more_errors_are_no_mistake() -> None:
    program = "import sys\nprint('x' * 300_000)\nsys.stderr.write('y' * 300_000)"
    pairs = [{"input": "", "output": "x" * 300_000}, {"input": "", "output": "x" * 299_999}]
    # the second test expects another output
    assert CodeReward(seconds=20.0, allow_limits_only=True)([program], [pairs]) == [0.5]
    assert CodeReward(seconds=20.0, allow_limits_only=True)([program], ["assert sys"]) == [1.0]
    result = run(program)
    assert (result.ended, len(result.errors)) == ("", 1 << 16)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (ADD, 1.0),
        (f"First:\n```python\nx = 1\n```\nno,\n{ADD}\nThat is all.", 1.0),
        (ADD.replace("+", "-"), 0.0),
        (ADD.replace("return", "raise SystemExit  #"), 0.0),
        (f"{ADD[:-3]}raise SystemExit(0)\n```", 0.0),
        (f"{ADD[:-3]}import os\nos._exit(0)\n```", 0.0),
        (f"{ADD[:-3]}print('passed')\nprint('True')\nraise SystemExit\n```", 0.0),
        (f"{ADD[:-3]}print = lambda *_: None\n```", 0.0),
        (f'{ADD[:-3]}x = """\n```', 0.0),
        (f"{ADD[:-3]}if False:\n```", 0.0),
        ("def add(", 0.0),
        ("I cannot do that.", 0.0),
        ("", 0.0),
    ],
)
def test_asserts_decide_and_must_be_reached(completion: str, score: float) -> None:
    asserts = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
    assert CodeReward(seconds=20.0, allow_limits_only=True)([completion], [asserts]) == [score]


def test_what_is_printed_decides_by_the_share_of_tests() -> None:
    pairs = [
        {"input": "1 2\n", "output": "3"},
        {"input": "2 2", "output": "4\n"},
        {"input": "", "output": "x"},
    ]
    reward = CodeReward(seconds=20.0, allow_limits_only=True)
    assert reward(["print(sum(map(int, input().split())))"], [pairs]) == [pytest.approx(2 / 3)]
    with pytest.raises(ValueError, match="its column 'tests' is an empty list"):
        reward(["print(1)"], [[]])


@pytest.mark.parametrize("level", [LIMITED, "best"])
@pytest.mark.parametrize(
    ("code", "ended", "status"),
    [
        ("while True: pass", "time", -9),
        ("import time; time.sleep(60)", "time", -9),
        ("print('x' * 10**8)", "output", -9),
        ("x = bytearray(1 << 31)", "", 1),
        ("open('big', 'wb').write(b'x' * (64 << 20))", "", 1),
        ("import ctypes; ctypes.string_at(0)", "", -11),
        ("import os; os._exit(3)", "", 3),
        # the program is the first process of its namespace, which no process inside can kill
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "", None),
        ("import os; os.closerange(0, 9)\nwhile True: pass", "time", -9),
        (
            "import os, signal\nfor s in range(1, 32): s in (9, 19) or signal.signal(s, 1)\nwhile True: pass",
            "time",
            -9,
        ),
        ("import os; os.rmdir(os.getcwd()); print(1)", "", 1),
        ("x = [b'x' * (1 << 20) for _ in range(4096)]", "", 1),
        ("import threading\nfor _ in range(9999): threading.Thread(target=input).start()", "", None),
        ("import numpy", "", 1),
    ],
)
def test_a_program_stays_within_its_limits(code: str, ended: str, status: int | None, level: str) -> None:
    """`status` None: the program may end in several ways, but it must end."""
    level = isolation() if level == "best" else level
    limits = Limits(seconds=2.0) if ended == "time" else QUICK
    result = run(code, level, limits)
    if status is None:
        assert result.ended in ("", "time", "output"), result
    else:
        assert (result.ended, result.status) == (ended, status), result


def test_a_program_has_no_environment_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1234")
    result = run("import os; print(sorted(os.environ), os.listdir('.'))")
    assert "SECRET" not in result.output
    assert "['program.py']" in result.output


def test_what_a_program_reads_is_its_input() -> None:
    assert run("print(input() + '!')", standard_input="hello\n").output == "hello!\n"


def test_in_namespaces_a_program_writes_nowhere_else_and_reaches_nobody(tmp_path: Path) -> None:
    needs_namespaces()
    os.chmod(tmp_path, 0o777)
    target = tmp_path / "written"
    code = f"""
import os, socket
try:
    open({str(target)!r}, "w").write("x")
except OSError as error:
    print("write", type(error).__name__)
try:
    socket.create_connection(("127.0.0.1", 22), timeout=1)
except OSError as error:
    print("connect", type(error).__name__)
try:
    open("/proc/sys/kernel/hostname", "w").write("x")
except OSError as error:
    print("settings", type(error).__name__)
print("processes", sum(name.isdigit() for name in os.listdir("/proc")))
print("user", os.getuid())
open("own", "w").write("fine")
"""
    result = run(code)
    assert result.status == 0, result
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines] == ["write", "connect", "settings", "processes", "user"]
    assert lines[3:] == ["processes 1", "user 65534"]
    assert not target.exists()


def test_in_namespaces_a_program_can_end_nobody_but_itself() -> None:
    needs_namespaces()
    code = """
import os, signal
for target in (-1, 0, os.getppid()):
    try:
        os.kill(target, signal.SIGTERM if target else 0)
    except OSError as error:
        print(type(error).__name__)
print("alive")
"""
    result = run(code)
    assert result.output.split()[-1] == "alive", result


def test_in_namespaces_what_a_program_leaves_behind_ends_with_it() -> None:
    needs_namespaces()
    name = f"left{os.getpid()}"
    code = f"""
import ctypes, os, time
if os.fork() == 0:
    os.setsid()
    ctypes.CDLL(None).prctl(15, {name.encode()!r})
    os.closerange(0, 9)
    time.sleep(600)
time.sleep(0.2)
print("done")
"""
    result = run(code)
    assert (result.ended, result.status, result.output) == ("", 0, "done\n")
    assert name not in map(comm, Path("/proc").glob("[0-9]*/comm"))


def test_in_namespaces_a_fork_bomb_ends_with_its_program() -> None:
    needs_namespaces()
    name = f"bomb{os.getpid()}"
    code = f"""
import ctypes, os, time
ctypes.CDLL(None).prctl(15, {name.encode()!r})
for _ in range(8):
    try:
        os.fork()
        os.setsid()
    except OSError:
        pass
print(sum(name.isdigit() for name in os.listdir("/proc")), flush=True)
time.sleep(60)
"""
    result = run(code, limits=Limits(seconds=3.0, processes=16))
    assert result.ended == "time"
    assert max(map(int, result.output.split())) > 8
    assert name not in map(comm, Path("/proc").glob("[0-9]*/comm"))


def comm(path: Path) -> str:
    """The name of a process, if it is still there."""
    try:
        return path.read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_without_namespaces_programs_run_only_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlhf.rewards.code.isolation", lambda: LIMITED)
    with pytest.raises(RuntimeError, match=r"NOT kept from reading .*allow_limits_only: true"):
        CodeReward()
    assert CodeReward(allow_limits_only=True).limits.seconds == 5.0


def test_no_other_user_can_reach_a_program_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may not write the folder of a program, at any level, nor read the program."""
    seen: list[tuple[int, int]] = []

    def look(program: str, folder: str, *_: object) -> Result:
        seen.append((os.stat(folder).st_mode & 0o777, os.stat(program).st_mode & 0o777))
        return Result("", "", "", 0)

    monkeypatch.setattr(runner, "_run", look)
    for level in LEVELS:
        run("pass", level=level)
    assert seen == [(0o711, 0o600), (0o700, 0o600), (0o700, 0o600)]


def test_a_program_sees_the_interpreter_and_nothing_of_the_users(tmp_path: Path) -> None:
    needs_namespaces()
    secret = tmp_path / "answers.jsonl"
    secret.write_text("42")
    tmp_path.chmod(0o755)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid():
            folder.chmod(folder.stat().st_mode | 0o055)
    program = """
import json, os
walked = os.walk("/")
found = [os.path.join(place, n) for place, _, names in walked for n in names if n == "answers.jsonl"]
print(json.dumps([found + os.listdir("/tmp"), sorted(os.listdir("/")), os.listdir(".")]))
"""
    result = run(program)
    found, root, own = json.loads(result.output)
    # of /tmp only the program's own folder is there
    assert len(found) == 1 and found[0].startswith("program-") and own == ["program.py"]
    known = {"usr", "bin", "sbin", "lib", "lib32", "lib64", "etc", "dev", "proc", "tmp"}
    assert set(root) <= known | {Path(sys.base_prefix).parts[1]}


def test_a_program_reaches_no_socket_and_no_pipe_of_the_host(tmp_path: Path) -> None:
    needs_namespaces()
    place = Path(tempfile.mkdtemp())
    place.chmod(0o777)
    os.mkfifo(place / "pipe")
    (place / "pipe").chmod(0o666)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place / "socket"))
        (place / "socket").chmod(0o777)
        server.listen()
        program = f"""
import os, socket
for attempt in (
    lambda: socket.socket(socket.AF_UNIX).connect({str(place / "socket")!r}),
    lambda: os.open({str(place / "pipe")!r}, os.O_RDONLY | os.O_NONBLOCK),
):
    try:
        attempt()
    except OSError as error:
        print(type(error).__name__)
"""
        assert run(program).output.split() == ["FileNotFoundError"] * 2
    shutil.rmtree(place)
