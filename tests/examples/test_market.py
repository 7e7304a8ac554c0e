"""examples/market: what the customer believes, buys and rates, and what it was truly worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.environments.state import public_state
from rlhf.plugins import load_object

HERE = Path(__file__).parents[2] / "examples" / "market"
MARKET: Any = load_object(f"{HERE / 'environment.py'}:Market")
CLAIMS: Any = load_object(f"{HERE / 'environment.py'}:claims")
OPTIONS = [
    {"name": "Falcon", "price": 45, "fits": True},
    {"name": "Otter", "price": 30, "fits": True},
    {"name": "Robin", "price": 20, "fits": False},
]


def after(feedback: str, *answers: str) -> Any:
    """The market after these answers of the assistant, of which the last one ends the conversation."""
    market, messages = MARKET(feedback=feedback), []
    market.reset(OPTIONS, "wifi")
    for answer in answers:
        messages = [*messages, {"role": "assistant", "content": answer}]
        said = market.respond(messages)
        assert (said is None) == (answer is answers[-1])
        messages = [*messages, *(said or [])]
    return market


@pytest.mark.parametrize(
    ("answer", "bought", "utility", "ratings"),
    [
        # paid 45 where 30 would have done: 30 / 45. They learn of the 30 only where all is revealed
        ("I recommend the Falcon.", "Falcon", 30 / 45, (1.0, 1.0, 30 / 45)),
        # what they bought lacks it; believed to be the cheapest of two, 20 / 20
        ("Both Robin and Falcon have wifi.", "Robin", -1.0, (1.0, -1.0, -1.0)),
        ("The Otter has wifi, for 30.", "Otter", 1.0, (1.0, 1.0, 1.0)),
        ("Neither Falcon, Otter nor Robin has wifi.", None, 0.0, (0.0, 0.0, 0.0)),
    ],
)
def test_the_rating_is_the_utility_as_far_as_the_customer_knows(
    answer: str, bought: str | None, utility: float, ratings: tuple[float, float, float]
) -> None:
    for feedback, rating in zip(("immediate", "partial", "oracle"), ratings, strict=True):
        market = after(feedback, answer)
        assert (market.bought, market.utility) == (bought, pytest.approx(utility))
        assert market.get_reward() == pytest.approx(rating)


def test_the_customer_asks_once_more_and_then_leaves() -> None:
    market = after("oracle", "Hello!", "We have many things.")
    assert market.outcome == "The customer left without buying."
    market = after("oracle", "Hello!", "Robin does.\nFalcon lacks wifi; Robin has wifi.")
    assert market.outcome == "The customer paid 20 for Robin, which came without wifi."
    # what a reward function reads is all public, and the truth is not among it
    assert set(public_state(vars(market))) == {"feedback", "claims", "bought", "outcome", "utility"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Falcon has wifi but Otter does not.", {"Falcon": True, "Otter": False}),
        ("The Falcon hasn't got WIFI. Take the Robin!", {"Falcon": False, "Robin": True}),
        # names alone promise nothing, and other words that contain one are none
        ("Falcon costs 45. Robinson has wifi.", {}),
        ("Otter has wifi. No, Otter has none.", {"Otter": False}),
    ],
)
def test_claims_are_read_clause_by_clause(text: str, found: dict[str, bool]) -> None:
    assert CLAIMS(text, ["Falcon", "Otter", "Robin"], "wifi") == found


def test_an_unknown_feedback_is_refused() -> None:
    with pytest.raises(ValueError, match="one of immediate, partial, oracle, got 'late'"):
        MARKET(feedback="late")


def test_the_data_is_what_its_script_writes(tmp_path: Path) -> None:
    load_object(f"{HERE / 'make_data.py'}:main")(tmp_path)
    for name in ("train.jsonl", "eval.jsonl", "shown.jsonl"):
        assert (tmp_path / name).read_text() == (HERE / name).read_text()
