"""Rewards over HTTP against a real server on loopback that works, is slow, or drops connections."""

from __future__ import annotations

import json
import math
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlhf.rewards.remote import LLMJudge, RemoteError, RemoteReward
from tests.rewards.test_hostile import PATIENCE, TIMEOUT, causes, given, made_of, submit

JUDGED = {
    "judge": ("Right.\nScore: 3\nScore: **7.5**", "stop"),
    "tenth": ("Nearly.\n**Score: 7.5/10**\n", "stop"),
    "thinks": ("<think>It says Score: 10.\nScore: 10</think>\nNo.\nScore: 7.5", None),
    "mute": ("No idea.", "stop"),
    "wild": ("Score: 11", "stop"),
    "cut": ("The text asks for\nScore: 10", "length"),
    "quotes": ('It says "Score: 10", which I do not follow.', "stop"),
    "begins": ("Score: 10 is what the answer asks for, but", "stop"),
    "before": ("Score: 10\nis what the answer asks for.", "stop"),
    "thoughts": ("<think>The text asks for\nScore: 10", "stop"),
    "only": ("<think>Score: 10</think>", "stop"),
    "nothing": (None, "stop"),
}
"""What the judges write, and why they stop."""


def token(text: str, **top: float) -> dict[str, Any]:
    """A token of an answer, and the probabilities of what might stand in its place."""
    listed = [{"token": name.replace("_", " "), "logprob": math.log(p)} for name, p in top.items()]
    return {"token": text, "logprob": listed[0]["logprob"] if listed else 0.0, "top_logprobs": listed}


JUDGED |= {
    "pair": ("A is short.\nBetter: **B**", "stop"),
    "pair-thinks": ("<think>Better: A</think>\nBetter: A", "stop"),
    "pair-plain": ("Verdict: B", "stop"),
    "pair-cut": ("Better: A", "length"),
    "pair-quotes": ("<think>The text says\nBetter: A</think>\nNeither.", "stop"),
    "pair-within": ('It says "Better: A" but', "stop"),
}
LOGPROBS = {
    # of the two letters .2 and .6, the first in two ways of writing it
    "pair": [
        token("A", A=1.0),
        token(" is short.\n"),
        token("Better:"),
        token(" **"),
        token("B", B=0.6, A=0.1, _A=0.1, C=0.1),
        token("**"),
    ],
    "pair-thinks": [token("A", A=0.5, B=0.5), token("</think>"), token(" A", _A=0.9, C=0.1)],
}
"""The tokens of what some of them write, where log-probs are asked for."""


class Service(ThreadingHTTPServer):
    """A server that behaves as the path of the request says, and keeps the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str, Any]] = []
        self.connections = 0
        self.closing = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Called when a client did not wait. Prints nothing: two threads that format a traceback at once can
        fail in Python 3.11, which parses the source to mark the place."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        seen = sum(path == self.path for path, _, _ in self.server.requests)
        self.server.requests.append((self.path, self.headers["Idempotency-Key"], sent))
        kind = self.path.removeprefix("/").removesuffix("/chat/completions")
        if kind == "slow" or (kind == "slow-once" and not seen):
            self.server.closing.wait(PATIENCE)
            return
        odd = len(self.server.requests) % 2
        if kind == "drop" or (kind == "drop-once" and not seen) or (kind == "drop-odd" and odd):
            self.close_connection = True
            self.connection.close()
            return
        if kind.startswith("status"):
            code = int(kind.removeprefix("status").removesuffix("-once"))
            if not (kind.endswith("once") and seen):
                self._answer(code, b"out of order")
                return
        self._answer(200, json.dumps(self._result(kind, sent)).encode() if kind != "text" else b"good")

    def _result(self, kind: str, sent: Any) -> Any:
        if "messages" in sent:
            text, reason = JUDGED[kind]
            choice: dict[str, Any] = {"message": {"content": text}, "finish_reason": reason}
            if sent.get("logprobs") and kind in LOGPROBS:
                choice["logprobs"] = {"content": LOGPROBS[kind]}
            return {"choices": [choice]}
        if kind == "short":
            return {"scores": []}
        if kind == "list":
            return [1.0]
        return {"scores": [float(len(sample["completion"])) for sample in sent["samples"]]}

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving() -> Iterator[Service]:
    with Service() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as server:
        yield server


def remote(service: Service, path: str, **changes: Any) -> RemoteReward:
    return RemoteReward(service.url(path), **({"seconds": PATIENCE, "attempts": 3, "pause": 0.01} | changes))


def test_samples_go_in_batches_with_their_columns_and_one_connection(service: Service) -> None:
    service.requests.clear()
    reward, before = remote(service, "score", columns=["answer"]), service.connections
    chat = [[{"role": "assistant", "content": "abc"}]]
    assert reward(["p", "q"], ["a", "bc"], answer=[1, 2], level=[3, 4]) == [1.0, 2.0]
    assert reward(["r"], chat, answer=[5], completion_ids=[[1]]) == [3.0]
    assert service.connections - before == 1
    (_, key, first), (_, other, _) = service.requests
    assert first == {
        "samples": [
            {"prompt": "p", "completion": "a", "answer": 1},
            {"prompt": "q", "completion": "bc", "answer": 2},
        ]
    }
    assert key != other


@pytest.mark.parametrize("path", ["drop-once", "status503-once", "status429-once", "slow-once"])
def test_what_may_pass_is_tried_again_under_the_same_key(service: Service, path: str) -> None:
    service.requests.clear()
    before = random.getstate()
    assert remote(service, path, seconds=1.0)(["p"], ["abc"]) == [3.0]
    assert random.getstate() == before
    assert len(service.requests) == 2
    assert len({key for _, key, _ in service.requests}) == 1


@pytest.mark.parametrize(
    ("path", "message", "tries"),
    [
        ("drop", "no answer in 3 attempts, the last: RemoteDisconnected", 3),
        ("status500", "no answer in 3 attempts, the last: status 500: out of order", 3),
        ("status400", "status 400: out of order", 1),
        ("status401", "status 401", 1),
        ("text", "did not answer with JSON: b'good'", 1),
        ("list", r"must answer .*scores.*, got \[1.0\]", 1),
    ],
)
def test_what_does_not_pass_is_an_error_that_says_what_came(
    service: Service, path: str, message: str, tries: int
) -> None:
    service.requests.clear()
    with pytest.raises(RemoteError, match=message):
        remote(service, path)(["p"], ["abc"])
    assert len(service.requests) == tries


def test_nobody_there_is_an_error_too() -> None:
    with pytest.raises(RemoteError, match="no answer in 2 attempts, the last: ConnectionRefusedError"):
        RemoteReward("http://127.0.0.1:9/score", attempts=2, pause=0.01)(["p"], ["a"])


@pytest.mark.parametrize(("path", "kind"), [("slow", "timeout"), ("drop", "exception"), ("short", "wrong")])
def test_a_run_outlives_its_service_or_says_who_it_was(service: Service, path: str, kind: str) -> None:
    params = {"url": service.url(path), "seconds": PATIENCE, "attempts": 2, "pause": 0.01}
    timeout = TIMEOUT if kind == "timeout" else PATIENCE
    with made_of("remote", params=params, timeout=timeout, max_failed_share=1.0) as rewards:
        scoring = submit(rewards, ["abc"])
        if kind == "wrong":
            with pytest.raises(Exception, match="reward function remote must return 1 values"):
                scoring.result()
        else:
            assert given(scoring) == [None]
            assert causes(scoring)[0][1] == kind


def test_a_judge_gives_the_score_it_writes_last(service: Service) -> None:
    service.requests.clear()
    judge = LLMJudge(service.url("judge"), "m", template="{prompt}|{completion}|{level}|{other}")
    assert judge([[{"role": "user", "content": "Why {completion}?"}]], ["So."], level=[3]) == [0.75]
    sent = service.requests[0][2]
    assert sent["model"] == "m"
    assert sent["messages"] == [{"role": "user", "content": "user: Why {completion}?|So.|3|{other}"}]


def test_a_judge_reads_the_whole_of_an_episode(service: Service) -> None:
    service.requests.clear()
    call = {"name": "add", "arguments": {"a": 1}}
    said = [("assistant", "Let me see."), ("tool", "3"), ("assistant", "It is 3.")]
    episode = [{"role": role, "content": text} for role, text in said]
    episode[0]["tool_calls"] = [call]  # pyright: ignore[reportArgumentType]
    assert LLMJudge(service.url("judge"), "m", template="{completion}")(["1 + 2?"], [episode]) == [0.75]
    [message] = service.requests[0][2]["messages"]
    called = '[calls {"name": "add", "arguments": {"a": 1}}]'
    assert message["content"] == f"assistant: Let me see. {called}\ntool: 3\nassistant: It is 3."


@pytest.mark.parametrize("path", ["judge", "tenth", "thinks"])
def test_a_verdict_is_the_last_line_behind_the_thoughts(service: Service, path: str) -> None:
    assert LLMJudge(service.url(path), "m")(["p"], ["a"]) == [0.75]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mute", "does not end with a score: 'No idea.'"),
        ("wild", "score 11 lies outside 0 to 10"),
        ("cut", "cut at max_tokens = 256, before its verdict; raise max_tokens in params"),
        ("quotes", "does not end with a score: 'It says"),
        ("begins", "does not end with a score"),
        ("before", "does not end with a score"),
        ("thoughts", "no answer beside its thoughts: '<think>The text"),
        ("only", "no answer beside its thoughts"),
        ("nothing", "no answer beside its thoughts"),
    ],
)
def test_a_judge_without_a_verdict_is_an_error(service: Service, path: str, message: str) -> None:
    with pytest.raises(RemoteError, match=message):
        LLMJudge(service.url(path), "m")(["p"], ["a"])


def test_a_pattern_of_ones_own_may_stand_anywhere_in_the_answer(service: Service) -> None:
    assert LLMJudge(service.url("quotes"), "m", pattern=r"Score: (\d+)")(["p"], ["a"]) == [1.0]


def test_settings_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match="expected an address like http"):
        RemoteReward("localhost:8000")
    with pytest.raises(ValueError, match="NO_SUCH_KEY, named by key_variable, is not set"):
        LLMJudge("http://127.0.0.1", "m", key_variable="NO_SUCH_KEY")
    with pytest.raises(ValueError, match=r"must have \{completion\}"):
        LLMJudge("http://127.0.0.1", "m", template="{prompt}")
