"""The judges that are built in: a chat endpoint (a stand-in on loopback), and tiny random models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.models.pretrained import load_model, load_tokenizer
from rlhf.rewards.judges.chat import PairJudge
from rlhf.rewards.judges.models import PairModel, PairRewards
from rlhf.rewards.model import RewardModel
from rlhf.rewards.remote import RemoteError
from tests.rewards.test_judges import judged, score
from tests.rewards.test_model import LABELS, save_classifier
from tests.rewards.test_remote import Service, serving

CHAT = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as server:
        yield server


def asked(service: Service, path: str, **settings: Any) -> float | None:
    [verdict] = PairJudge(service.url(path), "m", **settings)(["p"], [["a", "b"]])
    return verdict


def test_a_verdict_has_the_probability_of_its_letter_against_the_other(service: Service) -> None:
    # A .1 + .1 and B .6, where the verdict is; the A at the beginning is no verdict
    assert asked(service, "pair") == pytest.approx(0.25)
    # B is not among the tokens listed
    assert asked(service, "pair-thinks") == 1.0
    assert asked(service, "pair", logprobs=False) == 0.0


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("pair-cut", "cut at max_tokens"),
        ("pair-quotes", "does not end with a line Better: A or Better: B: "),
        ("pair-within", "does not end with a line"),
        ("only", "no answer beside its thoughts"),
        ("nothing", "no answer beside its thoughts"),
        ("mute", "does not end with a line"),
    ],
)
def test_a_verdict_that_is_cut_thought_or_quoted_is_none_and_says_why(
    service: Service, path: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(service, path) is None
    said = capsys.readouterr().out
    assert said.startswith("no verdict: ") and reason in said and said.count("\n") == 1


def test_an_endpoint_without_log_probs_is_an_error_that_says_what_to_set(service: Service) -> None:
    with pytest.raises(RemoteError, match="no log-prob of the verdict B: set logprobs: false in params"):
        asked(service, "pair-plain")
    assert asked(service, "pair-plain", logprobs=False) == 0.0


def test_the_judge_reads_both_completions_the_prompt_and_columns(service: Service) -> None:
    service.requests.clear()
    judge = PairJudge(service.url("pair"), "m", template="{prompt}|{first}|{second}|{level}|{other}")
    first, second = ([{"role": "assistant", "content": text}] for text in ("So {second}.", "No."))
    judge([CHAT], [[first, second]], level=[3], completion_ids=[[[1], [2]]])
    [(_, _, sent)] = service.requests
    assert sent["messages"] == [{"role": "user", "content": "user: Why?|So {second}.|No.|3|{other}"}]
    assert (sent["model"], sent["logprobs"]) == ("m", True)
    with pytest.raises(ValueError, match=r"must have \{first\} and \{second\}"):
        PairJudge(service.url("pair"), "m", template="{first}")


def test_the_judge_reads_episodes_as_conversations(service: Service) -> None:
    """Both, also the one that needed no second turn."""
    service.requests.clear()
    long = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]},
        {"role": "tool", "name": "add", "content": "5"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Sure?"}]},
        {"role": "assistant", "content": "5"},
    ]
    short = [{"role": "assistant", "content": "6"}]
    judge = PairJudge(service.url("pair"), "m", template="{first}|{second}")
    judge([CHAT, CHAT], [[long, short], [short, short]])
    assert [sent["messages"][0]["content"] for _, _, sent in service.requests] == [
        'assistant: [calls {"function": {"name": "add"}}]\ntool: 5\nuser: [image] Sure?\nassistant: 5'
        "|assistant: 6",
        "6|6",
    ]


def test_a_judge_behind_an_endpoint_in_a_worker(service: Service) -> None:
    with judged("pair_judge", params={"url": service.url("pair"), "model": "m"}) as rewards:
        (group,), metrics = score(rewards, ["a", "b"])
    # the same .25 in both orders: the second place always wins, which is a tie
    assert [t.reward for t in group.trajectories] == [0.5, 0.5]
    assert (metrics["duels/first"].value, metrics["duels/disagree"].value) == (0.0, 1.0)


def test_a_preference_model_compares_the_logits_of_two_letters(tiny_model_dir: Path) -> None:
    judge = PairModel(str(tiny_model_dir), template="{prompt}: {first} or {second}", letters=("a", "b"))
    found = judge(["Why?", CHAT], [["so", "no"], ["because of this", "eh"]])
    tokenizer: Any = load_tokenizer(str(tiny_model_dir))
    model: Any = load_model(str(tiny_model_dir), torch.device("cpu"))
    for text, p in zip(("Why?: so or no", "user: Why?: because of this or eh"), found, strict=True):
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
        logits = model(ids).logits[0, -1]
        a, b = (logits[tokenizer.convert_tokens_to_ids(letter)].item() for letter in "ab")
        # softmax over two: 1 / (1 + e^(b - a))
        assert p == pytest.approx(1 / (1 + math.exp(b - a)), abs=1e-5)


def test_a_preference_model_refuses_what_it_cannot_compare(tiny_model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"letters: 'AB' must be one token of .*, but it is 2"):
        PairModel(str(tiny_model_dir), letters=("AB", "B"))
    with pytest.raises(ValueError, match=r"must have \{first\} and \{second\}"):
        PairModel(str(tiny_model_dir), template="{first}")
    with pytest.raises(ValueError, match="tokens, more than max_tokens = 10 of pair_model"):
        PairModel(str(tiny_model_dir), max_tokens=10)(["Why?"], [["a", "b"]])


def test_the_rewards_of_a_model_give_a_probability(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "one", ["reward"])
    one, two = RewardModel(str(folder))(["Why?", "Why?"], ["so", "because"])
    assert isinstance(one, float) and isinstance(two, float)
    pairs = [["so", "because"], ["because", "so"]]
    p, q = PairRewards(str(folder), temperature=0.5)(["Why?", "Why?"], pairs)
    assert p == pytest.approx(1 / (1 + math.exp((two - one) / 0.5)), abs=1e-6)
    assert q == pytest.approx(1 - p, abs=1e-6)
    with pytest.raises(ValueError, match="gives 4 scores; two completions need one each"):
        PairRewards(str(save_classifier(tmp_path / "four", LABELS)))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        PairRewards(str(folder), temperature=0)
