"""The verdict claims no more than the evaluations support; the page holds everything in one file."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.monitoring.records import append_eval, read_eval, read_metrics
from rlhf.monitoring.report.summary import closing_summary, write_report
from rlhf.monitoring.report.verdict import difference, verdict
from rlhf.monitoring.run_folder import RunFolder


def evaluation(step: int, accuracy: float, margin: float = 0.05, right: bool = True) -> dict[str, Any]:
    sample = {
        "prompt": "What is 3 + 5?\nAnswer with the number alone.",
        "completion": f"{8 if right else 'nine'} </b> after {step}",
        "reward": float(right),
        "right": right,
    }
    return {
        "step": step,
        "accuracy": accuracy,
        "num_samples": 128,
        "ci_low": max(0.0, accuracy - margin),
        "ci_high": min(1.0, accuracy + margin),
        "samples": [sample],
    }


def step(number: int, **values: float) -> dict[str, float]:
    usual = {"reward/mean": 0.1 * number, "reward/std": 0.4, "grad_norm": 0.5, "length/truncated": 0.1}
    return {"step": number, **usual, **values}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    entries = [step(n, **{"time/step": 10.0, "time/rollout": 6.0, "time/learn": 4.0}) for n in range(1, 7)]
    run.metrics.write_text("".join(json.dumps(e) + "\n" for e in entries))
    run.config.write_text("steps: 6\nreward: <mean>\n")
    append_eval(run, evaluation(0, 0.15, right=False))
    append_eval(run, evaluation(6, 0.93))
    return run


def test_evaluations_are_kept_by_step_and_the_last_of_a_step_counts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert read_eval(run) == []
    for record in (evaluation(10, 0.5), evaluation(0, 0.1), evaluation(10, 0.6)):
        append_eval(run, record)
    assert [(r["step"], r["accuracy"]) for r in read_eval(run)] == [(0, 0.1), (10, 0.6)]


def test_an_incomplete_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="an evaluation has"):
        append_eval(RunFolder(tmp_path), {"step": 0, "accuracy": 0.1})


@pytest.mark.parametrize("content", ["[{", '{"step": 1}', '[{"step": 1}]', "[3]"])
def test_a_file_that_holds_no_evaluations_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(ValueError, match=r"eval\.json (is not JSON|must be a list)"):
        read_eval(RunFolder(tmp_path))


def test_a_torn_line_and_nulls_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kl/ref": null}\n{"step": 2}\n{"step": 3, "re')
    assert read_metrics(RunFolder(tmp_path)) == [{"step": 1}, {"step": 2}]


def test_the_interval_of_a_difference_by_hand() -> None:
    # 56/70 against 48/80 with their Wilson intervals, the first example of Newcombe's paper: 0.0524 to 0.3339
    change, low, high = difference((48 / 80, 0.4905, 0.7004), (56 / 70, 0.6916, 0.8770))
    assert (round(change, 4), round(low, 3), round(high, 3)) == (0.2, 0.052, 0.334)


SHARE = st.floats(0.0, 1.0)


@given(st.tuples(SHARE, SHARE, SHARE), st.tuples(SHARE, SHARE, SHARE))
def test_a_difference_lies_in_its_interval_and_turns_with_the_order(
    one: tuple[float, float, float], two: tuple[float, float, float]
) -> None:
    (l1, p1, u1), (l2, p2, u2) = sorted(one), sorted(two)
    before, after = (p1, l1, u1), (p2, l2, u2)
    change, low, high = difference(before, after)
    assert low <= change <= high
    assert difference(after, before) == pytest.approx((-change, -high, -low))


@pytest.mark.parametrize(
    ("before", "after", "outcome", "words"),
    [
        (
            0.15,
            0.93,
            "rose",
            r"It learned: held-out accuracy rose from 0.15 to 0.93 \(\+0.78, 95% interval \+0.71 to \+0.85\)",
        ),
        (
            0.50,
            0.53,
            "unchanged",
            r"It did not learn measurably: .* \(\+0.03, 95% interval -0.04 to \+0.10\)",
        ),
        (0.50, 0.50, "unchanged", "may be chance"),
        (0.93, 0.15, "fell", "It got worse: held-out accuracy fell from 0.93 to 0.15"),
    ],
)
def test_it_learned_only_if_chance_does_not_explain_it(
    before: float, after: float, outcome: str, words: str
) -> None:
    said = verdict([evaluation(0, before), evaluation(10, 0.3), evaluation(20, after)], [])
    assert said.outcome == outcome and re.search(words, said.sentence), said.sentence


def rewarded(step: int, reward: float, prompts: int = 48) -> dict[str, Any]:
    """An evaluation by a reward that is not 0 or 1, none of whose completions reaches the threshold."""
    bounds = {"reward_low": reward - 0.05, "reward_high": reward + 0.05}
    shares = {"truncated": 0.25, "no_signal": 0.0}
    measured = {"num_prompts": prompts, "measure": "reward", "reward": reward, **bounds, **shares}
    return evaluation(step, 0.0, right=False) | measured


def test_of_a_reward_nothing_is_claimed_but_that_it_rose(run: RunFolder) -> None:
    said = verdict([rewarded(0, 0.31), rewarded(6, 0.56)], [])
    assert said.sentence == "Held-out reward rose from 0.31 to 0.56 (+0.25, 95% interval +0.18 to +0.32)."
    assert verdict([rewarded(0, 0.56), rewarded(6, 0.31)], []).sentence.startswith(
        "Held-out reward fell from"
    )
    assert verdict([rewarded(0, 0.5), rewarded(6, 0.51)], []).sentence.startswith("Held-out reward went from")
    for record in (rewarded(0, 0.31), rewarded(6, 0.56)):
        append_eval(run, record)
    write_report(run)
    text, page = closing_summary(run), run.report.read_text()
    assert "after step 6: held-out reward 0.560, 95% interval 0.510 to 0.610, 128 samples" in text
    assert "25% cut at the token limit" in text
    for word in ("accuracy", "correct", "wrong", "learned"):
        assert word not in text.lower(), word
    assert "Reward on held-out prompts" in page and "Accuracy on" not in page and ">wrong<" not in page


NOTHING_SAMPLED: dict[str, Any] = {
    "accuracy": None,
    "num_samples": 0,
    "ci_low": None,
    "ci_high": None,
    "samples": [],
    "num_prompts": 0,
    "measure": "pairs",
    "reward": None,
    "reward_low": None,
    "reward_high": None,
    "truncated": None,
    "no_signal": None,
}


def paired(
    step: int, accuracy: float, pairs: int = 150, sampled: dict[str, Any] | None = None
) -> dict[str, Any]:
    """An evaluation on held-out pairs, alone or beside samples."""
    found = {
        "num_pairs": pairs,
        "accuracy": accuracy,
        "ci_low": accuracy - 0.05,
        "ci_high": accuracy + 0.05,
        "accuracy_logprob": 0.61,
        "accuracy_per_token": 0.62,
        "accuracy_reference": 0.55,
        "flipped": 0.125,
        "idealised": None,
        "margin": 3.25,
        "chosen_logratio": -1.0,
        "topk_mass": 0.97,
        "topk_entropy": 1.25,
        "topk_entropy_normalised": 1.5,
        "samples": [],
    }
    return (sampled or NOTHING_SAMPLED) | {"step": step, "pairs": found}


def test_of_pairs_nothing_is_claimed_but_their_accuracy(run: RunFolder) -> None:
    for record in (paired(0, 0.52), paired(3, 0.7), paired(6, 0.91)):
        append_eval(run, record)
    said = verdict(read_eval(run), [])
    # bounds .05 aside: sqrt(.05^2 + .05^2) = .07
    assert said.sentence == (
        "Held-out pair accuracy rose from 0.52 to 0.91 (+0.39, 95% interval +0.32 to +0.46, 150 pairs)."
    )
    write_report(run)
    text, page = closing_summary(run), Page(run.report.read_text()).text
    assert text.splitlines()[2:8] == [
        "after step 0: held-out pair accuracy 0.520, 95% interval 0.470 to 0.570, 150 pairs",
        "  chosen is 3.25 nats further ahead of rejected than under the reference",
        "  by log-probability 0.610 are right, under the reference 0.550; 0.125 of its wrong ones now are",
        "after step 6: held-out pair accuracy 0.910, 95% interval 0.860 to 0.960, 150 pairs",
        "  chosen is 3.25 nats further ahead of rejected than under the reference",
        "  by log-probability 0.610 are right, under the reference 0.550; 0.125 of its wrong ones now are",
    ]
    for word in ("samples", "correct", "learned", "not known"):
        assert word not in text.lower(), word
    assert "Pair accuracy on held-out pairs" in page and "held-out prompts" not in page
    assert "Pair accuracy, 95% interval" in page and "their entropy, nats" in page and "1.250" in page


def test_pairs_that_stand_still_or_are_few_get_no_verdict() -> None:
    still = verdict([paired(0, 0.5), paired(6, 0.53)], [])
    assert still.outcome == "unchanged"
    assert still.sentence.startswith(
        "Held-out pair accuracy went from 0.50 to 0.53, and the difference may be"
    )
    few = verdict([paired(0, 0.5, 20), paired(6, 0.9, 20)], [])
    assert few.outcome == "unknown" and "20 held-out pairs are too few for a verdict" in few.sentence


def test_samples_and_pairs_are_both_told_and_samples_decide(run: RunFolder) -> None:
    for record in (
        paired(0, 0.5, sampled=evaluation(0, 0.93) | {"truncated": 0.25}),
        paired(6, 0.91, sampled=evaluation(6, 0.15, right=False)),
    ):
        append_eval(run, record)
    said, text = verdict(read_eval(run), []), closing_summary(run)
    assert said.outcome == "fell"
    assert said.sentence.startswith("It got worse: held-out accuracy fell from 0.93 to 0.15")
    assert said.sentence.endswith(
        "Held-out pair accuracy rose from 0.50 to 0.91 (+0.41, 95% interval +0.34 to +0.48, 150 pairs)."
    )
    assert (
        "after step 0: held-out accuracy 0.930, 95% interval 0.880 to 0.980, 128 samples; 25% cut at the "
        "token limit; held-out pair accuracy 0.500, 95% interval 0.450 to 0.550, 150 pairs"
    ) in text
    write_report(run)
    page = Page(run.report.read_text()).text
    assert "Accuracy on held-out prompts" in page and "Pair accuracy on held-out pairs" in page


def given_pairs(number: int, accuracy: float) -> dict[str, float]:
    found = {
        "pairs/accuracy": accuracy,
        "pairs/loss": 0.6,
        "pairs/margin": 0.1 * number,
        "offline/kept_fraction": 1.0,
    }
    return {"step": number, "reward/mean": 0.5, "length/mean": 20.0, "grad_norm": 0.5, **found}


def test_a_run_on_given_pairs_shows_these_and_not_their_rewards(run: RunFolder) -> None:
    run.evaluations.unlink()
    entries = [
        given_pairs(n, 0.5 + 0.05 * n) | {"pairs/chosen_logratio": 0.1, "pairs/rejected_logratio": -0.1}
        for n in range(1, 7)
    ]
    run.metrics.write_text("".join(json.dumps(e) + "\n" for e in entries))
    said = verdict([], read_metrics(run))
    assert "The pair accuracy in training went from 0.550 to 0.800" in said.sentence and said.reasons == ()
    write_report(run)
    page = Page(run.report.read_text()).text
    for title in (
        "Loss of the pairs",
        "Margin of chosen over rejected",
        "Log-ratio to the reference, nats a compl",
    ):
        assert title in page
    assert "Log-probability, nats a token" in page.split("Not recorded in this run")[1]
    for title in ("Reward, mean", "Length of completions", "Tokens sampled a second", "Rollouts of a prompt"):
        assert title not in page, title


def test_a_run_without_pairs_does_not_miss_their_plots(run: RunFolder) -> None:
    write_report(run)
    assert "of the pairs" not in Page(run.report.read_text()).text


def test_the_closing_lines_name_the_exported_model(run: RunFolder) -> None:
    assert "model  " not in closing_summary(run)
    (run.path / "model").mkdir()
    (run.path / "model" / "config.json").write_text("{}")
    assert f"model       {run.path}/model, for from_pretrained of transformers" in closing_summary(run)


def test_a_first_evaluation_of_zeros_alone_is_shown_as_the_others_are(run: RunFolder) -> None:
    """By itself it might be an accuracy; beside one with other rewards it is a reward."""
    for record in (rewarded(0, 0.0) | {"measure": "accuracy"}, rewarded(6, 0.56)):
        append_eval(run, record)
    text = closing_summary(run)
    assert "after step 0: held-out reward 0.000" in text and "accuracy" not in text and "wrong" not in text


def test_few_prompts_get_no_verdict() -> None:
    few = [evaluation(0, 0.1) | {"num_prompts": 26}, evaluation(9, 0.9) | {"num_prompts": 26}]
    said = verdict(few, [])
    assert said.outcome == "unknown" and "learned" not in said.sentence
    assert (
        said.sentence.startswith("Held-out accuracy went from 0.10 to 0.90")
        and "26 held-out" in said.sentence
    )
    assert verdict([record | {"num_prompts": 30} for record in few], []).outcome == "rose"


def test_a_wide_interval_keeps_a_large_difference_from_counting() -> None:
    assert verdict([evaluation(0, 0.2, 0.3), evaluation(9, 0.5, 0.3)], []).outcome == "unchanged"


def test_without_two_evaluations_nothing_is_claimed() -> None:
    steps = [step(n) for n in range(1, 11)]
    said = verdict([], steps)
    assert said.outcome == "unknown"
    assert "not known" in said.sentence and "from 0.150 to 0.950" in said.sentence
    assert "first and the last 2 of 10 steps" in said.sentence
    assert verdict([evaluation(0, 0.9)], steps).sentence.startswith("Only one evaluation was made")
    assert verdict([], []).sentence == "No evaluation was made: whether it learned is not known."


def test_a_run_that_did_not_learn_is_told_why() -> None:
    steps = [step(n, **{"advantage/zero_fraction": 1.0}) for n in range(1, 9)]
    said = verdict([evaluation(0, 0.5), evaluation(8, 0.5)], steps)
    assert len(said.reasons) == 1 and "all advantages are zero" in said.reasons[0]


def test_the_closing_summary_says_what_one_wants_to_know(run: RunFolder) -> None:
    write_report(run)
    assert closing_summary(run).splitlines() == [
        "It learned: held-out accuracy rose from 0.15 to 0.93 (+0.78, 95% interval +0.71 to +0.85).",
        "",
        "after step 0: held-out accuracy 0.150, 95% interval 0.100 to 0.200, 128 samples",
        "  wrong    What is 3 + 5? Answer with the number alone.  ->  nine </b> after 0",
        "after step 6: held-out accuracy 0.930, 95% interval 0.880 to 0.980, 128 samples",
        "  correct  What is 3 + 5? Answer with the number alone.  ->  8 </b> after 6",
        "",
        f"run folder  {run.path}",
        f"report      {run.report}",
    ]


def test_the_closing_summary_fits_a_terminal(run: RunFolder) -> None:
    record = evaluation(6, 0.5)
    record["samples"] = [{**record["samples"][0], "prompt": "long " * 99, "completion": "words\n" * 99}] * 5
    append_eval(run, record)
    lines = closing_summary(run).splitlines()
    assert max(len(line) for line in lines if line.startswith("  ")) <= 100
    assert sum("long long" in line for line in lines) == 3


def test_a_run_without_evaluations_or_steps_has_a_summary_and_a_page_too(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    write_report(run)
    assert "no evaluation was made" in closing_summary(run)
    assert "No step was recorded" in run.report.read_text()


def test_the_page_shows_completions_of_training(run: RunFolder) -> None:
    run.evaluations.unlink()
    entries = [
        {
            "step": n,
            "prompt": [{"role": "user", "content": f"question {n}"}],
            "completions": [
                {"text": f"answer {n}\u2028{k}", "reward": None if k else 0.5, "finish_reason": "stop"}
                for k in range(5)
            ],
        }
        for n in (1, 2, 3)
    ]
    run.samples.write_text(
        "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries) + '{"step": 4, "pr'
    )
    write_report(run)
    text = Page(run.report.read_text()).text
    assert "step 1: question 1" in text and "step 3: question 3" in text and "question 2" in text
    assert text.count("reward 0.50") == 3 and text.count("no reward") == 12


class Page(HTMLParser):
    """Parses a page: its tags in order, those left open, and the text outside of figures."""

    VOID = ("meta", "!doctype", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.starts: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.starts.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.starts.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if "svg" not in self.open and "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_the_page_holds_everything_in_one_file(run: RunFolder) -> None:
    write_report(run)
    content = run.report.read_text()
    page = Page(content)
    assert page.open == []
    for part in (
        "It learned: held-out accuracy rose from 0.15 to 0.93",
        "6 steps, 1.0 minutes of training, 10.0 s a step",
        "0.880 to 0.980",
        "nine </b> after 0",
        "8 </b> after 6",
        "reward: <mean>",
    ):
        assert part in page.text, part
    fetched = [
        attrs for _, attrs in page.starts if {"src", "srcset"} & attrs.keys() or "url(http" in str(attrs)
    ]
    assert fetched == [] and "@import" not in content
    assert not [tag for tag, _ in page.starts if tag in ("script", "link", "img", "iframe")]


def test_metrics_that_were_not_recorded_are_named_instead_of_drawn(run: RunFolder) -> None:
    write_report(run)
    page = Page(run.report.read_text())
    drawn = [attrs["aria-label"] for tag, attrs in page.starts if tag == "svg"]
    assert drawn == [
        "Reward, mean of a step, and its spread in a group",
        "Share of completions cut at the token limit",
        "Norm of the gradient",
        "Seconds a step",
    ]
    missing = re.search(r"Not recorded in this run: (.*?)\.", page.text)
    assert missing is not None and "KL to the reference" in missing[1] and "Reward" not in missing[1]


def test_drawings_take_the_colours_of_the_page(run: RunFolder) -> None:
    write_report(run)
    drawings = re.findall(r"<svg.*?</svg>", run.report.read_text(), flags=re.DOTALL)
    assert drawings
    for drawing in drawings:
        colours = set(re.findall(r"(?:fill|stroke): ?([#\w]+)", drawing))
        assert "currentColor" in colours and not colours & {"#000000", "#ffffff", "black", "white"}, colours


def test_three_evaluations_are_drawn_with_their_intervals(run: RunFolder) -> None:
    append_eval(run, evaluation(3, 0.5))
    write_report(run)
    assert 'aria-label="Accuracy, 95% interval"' in run.report.read_text()


def test_a_gap_in_a_metric_is_a_gap_in_its_curve(run: RunFolder) -> None:
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 7}) + "\n" + json.dumps(step(8)) + "\n")
    assert math.isclose(read_metrics(run)[-1]["reward/mean"], 0.8)
    write_report(run)
    assert Page(run.report.read_text()).open == []


def test_the_same_run_gives_the_same_page(run: RunFolder) -> None:
    write_report(run)
    first = run.report.read_text()
    write_report(run)
    assert run.report.read_text() == first
