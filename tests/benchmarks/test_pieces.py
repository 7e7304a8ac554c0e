"""The runner of `make bench-gpu`: what is done stays done, what hangs or fails costs itself alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from benchmarks.gpu import pieces_for
from benchmarks.pieces import OUT, ROOT, SUMMARY, UNAVAILABLE, Piece, Place, State, exit_code, run_pieces

# the standard library alone, so that a piece starts at once
WRITES = "import sys, json; json.dump({'answer': 42}, open(sys.argv[1], 'w'))"
COUNTS = (
    "import sys, json, pathlib; p = pathlib.Path(sys.argv[1] + '.runs');"
    "p.write_text(str(int(p.read_text()) + 1) if p.exists() else '1');"
    "json.dump(int(p.read_text()), open(sys.argv[1], 'w'))"
)


def piece(name: str, code: str, *, deadline: float = 20.0) -> Piece:
    return Piece(name, ("-I", "-c", code, OUT), deadline)


def place(folder: Path) -> Place:
    return Place(folder / "results", folder / "work", {"device": "cpu"}, {})


def states(pieces: list[Piece], where: Place, **limits: float) -> list[State]:
    return [outcome.state for outcome in run_pieces(pieces, where, **limits)]


def test_a_result_is_written_at_once_with_machine_and_command(tmp_path: Path) -> None:
    # the second piece sees the result of the first one, in place
    first = str(tmp_path / "results/a.json")
    looks = f"import sys, json; json.dump(json.load(open({first!r})), open(sys.argv[1], 'w'))"
    assert states([piece("a", WRITES), piece("b", looks)], place(tmp_path)) == [State.DONE, State.DONE]
    found = json.loads((tmp_path / "results/b.json").read_text())["result"]
    assert found["result"] == {"answer": 42}
    assert found["machine"] == {"device": "cpu"}
    assert found["command"].startswith("python -I -c")


def test_a_finished_piece_is_not_run_again_and_a_damaged_result_is(tmp_path: Path) -> None:
    where, pieces = place(tmp_path), [piece("a", COUNTS), piece("b", COUNTS)]
    assert states(pieces, where) == [State.DONE, State.DONE]
    (tmp_path / "results/b.json").write_text('{"cut of')
    assert states(pieces, where) == [State.BEFORE, State.DONE]
    runs = [json.loads((tmp_path / f"results/{name}.json").read_text())["result"] for name in "ab"]
    assert runs == [1, 2]


def test_a_failing_piece_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    where = place(tmp_path)
    outcomes = run_pieces(
        [
            piece("raises", "raise RuntimeError('the kernel is wrong')"),
            piece("silent", "pass"),
            piece("good", WRITES),
        ],
        where,
    )
    assert [o.state for o in outcomes] == [State.FAILED, State.FAILED, State.DONE]
    assert "RuntimeError: the kernel is wrong" in outcomes[0].reason
    assert "it wrote no result" in outcomes[1].reason
    assert exit_code(outcomes) == 1
    assert not (tmp_path / "results/raises.json").exists()
    summary = json.loads((tmp_path / "results" / SUMMARY).read_text())["pieces"]
    assert [entry["state"] for entry in summary] == ["failed", "failed", "done"]


def test_a_result_does_not_count_when_the_piece_fails_after_it(tmp_path: Path) -> None:
    assert states([piece("a", WRITES + "; sys.exit(3)")], place(tmp_path)) == [State.FAILED]
    assert not (tmp_path / "results/a.json").exists()


def test_a_piece_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    hangs = (
        "import subprocess, sys;"
        "child = subprocess.Popen([sys.executable, '-I', '-c', 'import time; time.sleep(60)']);"
        "open(sys.argv[1] + '.pid', 'w').write(str(child.pid)); print('at work', flush=True); child.wait()"
    )
    start = time.monotonic()
    outcomes = run_pieces([piece("hangs", hangs, deadline=1.5), piece("good", WRITES)], place(tmp_path))
    assert time.monotonic() - start < 30
    assert [o.state for o in outcomes] == [State.TIMED_OUT, State.DONE]
    assert "at work" in outcomes[0].reason
    child = int((tmp_path / "work/hangs.json.pid").read_text())
    assert _is_gone(child)


def _is_gone(pid: int) -> bool:
    """A killed process may stay a moment, as a zombie that nobody has asked for."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_stopped_piece_finds_what_it_wrote_and_goes_on(tmp_path: Path) -> None:
    steps = (
        "import sys, json, pathlib, time; p = pathlib.Path(sys.argv[1]);"
        "done = json.loads(p.read_text()) if p.exists() else 0;"
        "p.write_text(json.dumps(done + 1)); time.sleep(0 if done else 60)"
    )
    where, pieces = place(tmp_path), [piece("steps", steps, deadline=1.5)]
    assert states(pieces, where) == [State.TIMED_OUT]
    assert states(pieces, where) == [State.DONE]
    assert json.loads((tmp_path / "results/steps.json").read_text())["result"] == 2


def test_no_piece_is_begun_that_could_outlast_the_call(tmp_path: Path) -> None:
    where = place(tmp_path)
    pieces = [piece("long", COUNTS, deadline=500), piece("short", COUNTS, deadline=20)]
    outcomes = run_pieces(pieces, where, seconds=60)
    assert [o.state for o in outcomes] == [State.NOT_STARTED, State.DONE]
    assert exit_code(outcomes) == 2
    assert states(pieces, where) == [State.DONE, State.BEFORE]


def test_what_a_machine_lacks_is_said_and_tried_again(tmp_path: Path) -> None:
    where = place(tmp_path)
    lacking = piece("tool", f"import sys; print('the tool was not found'); sys.exit({UNAVAILABLE})")
    outcomes = run_pieces([lacking], where)
    assert outcomes[0].state is State.UNAVAILABLE
    assert "the tool was not found" in outcomes[0].reason
    assert exit_code(outcomes) == 0
    assert states([piece("tool", WRITES)], where) == [State.DONE]


def test_no_piece_takes_the_name_of_the_summary_or_longer_than_eight_minutes(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        pieces = pieces_for(device, tmp_path)
        names = [piece.name for piece in pieces]
        assert len(names) == len(set(names)) and SUMMARY.removesuffix(".json") not in names
        assert all(piece.deadline <= 480 for piece in pieces)
        modules = {piece.command[1].replace(".", "/") + ".py" for piece in pieces}
        assert all((ROOT / file).is_file() for file in modules)
