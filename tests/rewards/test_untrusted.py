"""What a policy wrote is never run where scores are kept, and reward workers get no keys but their own."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.rewards.expressions import NotAnExpression, formula_reader, value_of
from rlhf.rewards.gym import rows, score
from rlhf.rewards.mathematics import math_match
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.workers.environment import environment, hidden
from rlhf.rewards.workers.pool import WorkerPool
from rlhf.sandbox.confined import VerifierError, call_confined
from rlhf.sandbox.runner import LEVELS, isolation

TASKS = (
    "string_insertion", "spiral_matrix", "binary_matrix", "n_queens",
    "countdown", "puzzle24", "simple_integration", "intermediate_integration", "polynomial_multiplication",
)  # fmt: skip
"""The tasks of reasoning-gym that evaluate an answer, the first four by `eval`, the others by sympy."""


@pytest.mark.parametrize("task", TASKS)
def test_a_task_does_not_run_its_answer(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    entry = next(iter(rows(f"gym:{task}?size=1")))[1]["gym"]
    # without the process of its own, so that the look at the text alone has to hold it back
    monkeypatch.setattr("rlhf.rewards.gym.call_confined", lambda verify: verify())  # pyright: ignore
    mark = tmp_path / "mark"
    attacks = [f"__import__('pathlib').Path({str(mark)!r}).touch()", f"open({str(mark)!r}, 'w')"]
    scores = score(attacks, [entry] * 2)
    assert not mark.exists()
    assert max(scores) < 0.5


def test_tasks_still_accept_what_is_right() -> None:
    pytest.importorskip("reasoning_gym")
    inserted, count, integral = (
        next(iter(rows(f"gym:{task}?size=1")))[1]["gym"]
        for task in ("string_insertion", "countdown", "simple_integration")
    )
    right = count["entry"]["metadata"]["expression"]
    assert score([inserted["entry"]["answer"], right], [inserted, count], extract="whole") == [1.0, 1.0]
    assert score([integral["entry"]["answer"]], [integral], extract="whole") == [1.0]


def test_values_are_read_and_code_is_not() -> None:
    assert value_of(" [[1, -2], ['Q', '_']] ") == [[1, -2], ["Q", "_"]]
    assert value_of("0x1f & ~3") == 28
    for text in (
        "print(1)",
        "[].__class__",
        "x",
        "[y for y in ()]",
        "9**9**9",
        "'a' * 10",
        "f'{1}'",
        "lambda: 0",
    ):
        with pytest.raises(NotAnExpression):
            value_of(text)


def test_formulas_are_read_and_code_is_not() -> None:
    sympy = pytest.importorskip("sympy")
    read = formula_reader(sympy.parsing.sympy_parser.parse_expr)
    assert read("sqrt(16) + 3!") == 10
    assert read("x**2 + sin(x)") == sympy.Symbol("x") ** 2 + sympy.sin(sympy.Symbol("x"))
    for text in (
        "__import__('os')", "open(1)", "x.__class__", "exec(1)", "sympify(x)", "S('x')", "getattr(x, y)",
        "(lambda: 1)()", "Function(x)", "2**10**10", "x if y else z", "[x][0]",
    ):  # fmt: skip
        with pytest.raises(NotAnExpression):
            read(text)


def test_math_match_does_not_run_its_answer(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    mark = tmp_path / "mark"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    texts = [code, f"${code}$", rf"\boxed{{{code}}}", f"2 + {code}", rf"\operatorname{{{code}}}(1)"]
    math_match(texts, ["x + 1"] * len(texts))
    assert not mark.exists()


def attempts(mark: Path) -> list[Callable[[], object]]:
    return [
        lambda: mark.touch(),
        lambda: socket.create_connection(("127.0.0.1", 1)),
        lambda: os.environ["SOME_TOKEN"],
        lambda: os.kill(os.getppid(), 0) if os.getppid() else os.kill(int("x"), 0),
    ]


@pytest.mark.skipif(isolation() == LEVELS[-1], reason="this system allows no namespaces")
@pytest.mark.parametrize("number", range(4))
def test_a_verifier_reaches_nothing(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    expected = ("OSError", "OSError", "KeyError", "ValueError")[number]

    def verify() -> float:
        attempts(tmp_path / "mark")[number]()
        return 1.0

    with pytest.raises(VerifierError, match=expected):
        call_confined(verify)
    assert not (tmp_path / "mark").exists()


def test_what_a_verifier_changes_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = sys.modules[__name__]

    def verify() -> float:
        module.rows = None
        return 0.25

    assert call_confined(verify) == 0.25
    assert module.rows is not None
    with pytest.raises(VerifierError, match="status 7"):
        call_confined(lambda: os._exit(7))


def test_workers_get_the_variables_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MY_KEY", "OTHER", "HF_TOKEN", "WANDB_API_KEY", "CUDA_SECRET_KEY", "RANK"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("HF_HOME", "/hub")
    given = environment(RewardSpec("m:f"))
    assert given["HF_HOME"] == "/hub" and given["PATH"] == os.environ["PATH"]
    assert "secret" not in given.values()
    given = environment(RewardSpec("m:f", params={"key_variable": "MY_KEY"}, variables=["OTHER"]))
    assert {name for name, value in given.items() if value == "secret"} == {"MY_KEY", "OTHER"}
    # of a service among the parameters, as the customer of examples/market
    nested = environment(RewardSpec("m:f", params={"customer": {"url": "OTHER", "key_variable": "MY_KEY"}}))
    assert {name for name, value in nested.items() if value == "secret"} == {"MY_KEY"}
    with pytest.raises(ValueError, match="NOT_THERE, named by variables, is not set"):
        environment(RewardSpec("m:f", variables=["NOT_THERE"]))


def test_an_error_about_a_variable_that_is_held_back_says_how_to_give_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SERVICE_KEY", "secret")
    assert "variables: [SERVICE_KEY]" in hidden("KeyError: 'SERVICE_KEY'", RewardSpec("m:f"))
    assert hidden("KeyError: 'SERVICE_KEY'", RewardSpec("m:f", variables=["SERVICE_KEY"])) == ""
    assert hidden("KeyError: 'NOWHERE_SET'", RewardSpec("m:f")) == ""


def test_a_worker_has_no_key_of_the_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    (tmp_path / "mine.py").write_text(
        "import os\ndef reward(completions, **_): return [float('HF_TOKEN' in os.environ)]\n"
    )
    pool = WorkerPool("mine", RewardSpec(f"{tmp_path}/mine.py:reward", workers=1))
    pool.start()
    try:
        pool.wait_ready()
        worker: Any = pool._ready[0]
        outcomes = [answer for _, answer in worker.run([{"completions": ["x"]}], is_async=False)]
    finally:
        pool.close()
    assert outcomes[0]["scores"] == [{"mine": 0.0}]
