"""The report of a run with a gated reward model shows how much each objective counted for each prompt."""

from __future__ import annotations

from typing import Any

from rlhf.monitoring.report.gates import SHOWN, gates


def group(prompt: Any, **logged: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completions": [{"text": "x", "reward": 1.0, "logged": logged}]}


def test_the_last_weights_of_each_prompt_are_drawn_and_named() -> None:
    asked = [{"role": "user", "content": "What is the capital of <France>?"}]
    many = [
        group(f"question {i}", **{"judge/gate": {"correct": 0.7, "polite": 0.3}, "judge/steps": [1.0]})
        for i in range(SHOWN)
    ]
    page = gates([*many, group(asked, **{"judge/gate": {"correct": 0.9, "polite": 0.1}})])
    assert page.count("<svg") == 1 and f"Gate of judge: the last {SHOWN} prompts" in page
    assert all(
        name in page for name in ("correct", "polite", "capital of &lt;France&gt;?", f"question {SHOWN - 1}")
    )
    # one more than are shown, of which the oldest is left out
    assert "question 0<" not in page and "question 1<" in page


def test_a_run_without_a_gate_has_no_such_figure() -> None:
    assert gates([group("p"), group("p", **{"mine/gate": "open"}), group("p", **{"mine/gate": [1.0]})]) == ""
    assert gates([{"prompt": "p", "completions": [{"text": "x", "reward": 1.0}]}]) == ""
