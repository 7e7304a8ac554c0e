"""examples/market with a customer behind a chat endpoint: a stand-in on loopback, and none at all."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlhf.environments.protocol import Ending, Lost, Message
from rlhf.plugins import load_object
from rlhf.rewards.plugin import RewardSpec
from rlhf.rewards.scoring import Rewards
from rlhf.rollout.episode import Episode
from rlhf.types import Completion, FinishReason, Prompt
from tests.environments.asking import Answer, begin, pool_of

FILE = Path(__file__).parents[2] / "examples" / "market" / "environment.py"
MARKET: Any = load_object(f"{FILE}:Market")
COLUMNS: Mapping[str, Any] = {
    "options": [
        {"name": "Falcon", "price": 45, "fits": True},
        {"name": "Robin", "price": 20, "fits": False},
    ],
    "need": "wifi",
}


class Shopper(ThreadingHTTPServer):
    """A chat endpoint that answers as `says` does, which gets the prompt; keeps prompts and keys."""

    daemon_threads = True

    def __init__(self, says: Callable[[str], str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.says = says
        self.prompts: list[str] = []
        self.keys: set[str | None] = set()

    @property
    def settings(self) -> dict[str, Any]:
        return {"url": f"http://127.0.0.1:{self.server_port}/v1", "model": "m"}


class Handler(BaseHTTPRequestHandler):
    server: Shopper

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        [message] = sent["messages"]
        assert self.path == "/v1/chat/completions" and sent["model"] == "m"
        self.server.prompts.append(message["content"])
        self.server.keys.add(self.headers["Authorization"])
        answer = {"message": {"content": self.server.says(message["content"])}, "finish_reason": "stop"}
        body = json.dumps({"choices": [answer]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""


def shops(prompt: str) -> str:
    """Asks after the first answer, then buys what was named last; rates 4."""
    if "How content" in prompt:
        return "They were friendly.\nRating: 4"
    if prompt.count("assistant: ") == 1:
        return "<think>Buy: Robin?</think>\nI am not sure.\n**Ask:** Robin or Falcon?"
    return "Buy: the Robin." if "Robin has" in prompt else "leave"


@pytest.fixture(params=[shops])
def shopper(request: pytest.FixtureRequest) -> Iterator[Shopper]:
    with Shopper(request.param) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def says(*texts: str) -> list[Message]:
    """The assistant's turns, and the customer's question between them."""
    roles = ["assistant", "user", "assistant"]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


@pytest.mark.parametrize(
    ("feedback", "known"),
    [
        ("immediate", "You bought Robin and have not used it yet.\n"),
        ("partial", "You bought Robin, and it turned out that it does not have wifi.\n"),
        ("oracle", "that it does not have wifi. Those that truly have wifi: Falcon.\n"),
    ],
)
def test_a_language_model_plays_the_customer(shopper: Shopper, feedback: str, known: str) -> None:
    market = MARKET(feedback=feedback, customer=shopper.settings)
    market.reset(**COLUMNS)
    asked = market.respond(says("Hello!"))
    assert asked == [{"role": "user", "content": "Robin or Falcon?"}]
    assert market.respond(says("Hello!", asked[0]["content"], "Robin has wifi.")) is None
    # 4 of 1 to 5 is halfway between 0 and 1; what it was truly worth is not the model's to say
    assert (market.get_reward(), market.bought, market.utility) == (0.5, "Robin", -1.0)
    first, second, last = shopper.prompts
    assert "need wifi and want to pay little" in first and "Falcon 45, Robin 20" in first
    assert "\n\nassistant: Hello!\nuser: Robin or Falcon?\nassistant: Robin has wifi.\n\n" in second
    assert known in last and ("truly have" in last) == (feedback == "oracle")
    assert "turned out" not in first + second and "truly" not in first + second


def test_a_customer_who_leaves_rates_too(shopper: Shopper) -> None:
    market = MARKET(customer=shopper.settings)
    market.reset(**COLUMNS)
    assert market.respond(says("Hello!", "Robin or Falcon?", "No idea.")) is None
    assert (market.get_reward(), market.bought, market.utility) == (0.5, None, 0.0)
    assert "You left without buying. Those that truly have wifi: Falcon." in shopper.prompts[-1]


@pytest.mark.parametrize("shopper", [lambda prompt: "Buy: Otter", lambda prompt: "Rating: 9"], indirect=True)
def test_an_answer_that_is_none_is_an_error(shopper: Shopper) -> None:
    market = MARKET(customer=shopper.settings)
    market.reset(**COLUMNS)
    with pytest.raises(ValueError, match="must say what they buy or ask, or leave, in the last line, got '"):
        market.respond(says("Hello!"))
    with pytest.raises(ValueError, match="must be a rating from 1 to 5, got '"):
        market.get_reward()


def played(pool: Any, *texts: str) -> Ending | Lost:
    """The end of an episode with these turns of the assistant."""
    assert not isinstance(begin(pool, "p#0", "Market", columns=COLUMNS), Lost)
    for ask in (pool.respond, pool.end):
        answer = Answer()
        ask("p#0", says(*texts), answer)
        outcome = answer.wait()
        if isinstance(outcome, Lost):
            return outcome
    return outcome


def test_its_process_gets_the_key_that_is_named_for_it(
    shopper: Shopper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOPPER_KEY", "secret")
    customer = shopper.settings | {"key_variable": "SHOPPER_KEY"}
    with pool_of(f"{FILE}:Market", params={"customer": customer}) as pool:
        ending = played(pool, "Hello!", "Which?", "Robin has wifi.")
    assert isinstance(ending, Ending) and ending.reward == 0.5 and ending.state["bought"] == "Robin"
    assert shopper.keys == {"Bearer secret"}


def test_an_endpoint_that_is_gone_loses_the_episode_which_has_no_reward() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    customer = {"url": url, "model": "m", "pause": 0.01}
    with pool_of(f"{FILE}:Market", params={"customer": customer}) as pool:
        lost = played(pool, "Robin has wifi.")
    assert isinstance(lost, Lost)
    assert f"{url}/chat/completions: no answer in 2 attempts" in lost.message
    assert "ConnectionRefusedError" in lost.message
    of = Prompt("p", (1,), [{"role": "user", "content": "Wifi?"}], COLUMNS)
    turn = Completion("p", 0, (104,), (-0.5,), FinishReason.STOP, ())
    messages = tuple(says("Robin has wifi."))
    found = [
        Episode(
            prompt=of,
            index=i,
            turns=(turn,),
            finish_reason=FinishReason.STOP,
            messages=messages,
            environment="Market",
            rewards={} if why else {"Market": 0.5},
            state={"utility": -1.0},
            lost=why,
        )
        for i, why in enumerate((lost.message, None))
    ]
    rewards = scored(found)
    assert rewards == ([None, 0.5], 0.5, 0.5)


def scored(episodes: Sequence[Episode]) -> tuple[list[float | None], float, float]:
    """Rewards of a group by the environment, beside the reward function `utility`; share lost, and mean."""
    rewards = Rewards(
        [RewardSpec(f"{FILE}:utility", weight=0.0, workers=1)], ["environments"], max_failed_share=0.5
    )
    rewards.environment_rewards = True
    try:
        texts = [[e.messages[-1]["content"] for e in episodes]]
        [group], metrics = rewards.score([episodes[0].prompt], [episodes], texts, trainer_state={})
    finally:
        rewards.close()
    return (
        [t.reward for t in group.trajectories],
        metrics["turns/lost"].value,
        metrics["reward/mean"].value,
    )
