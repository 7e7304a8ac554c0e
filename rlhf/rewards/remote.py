"""Rewards over HTTP: `remote`, a scoring service of the user's, and `judge`, a language model as judge.

Requests are sent by worker processes, so a service that hangs costs its samples and nothing more. Failures
that may be temporary (a refused or dropped connection, a timeout, status 408, 425, 429, 500, 502, 503 or 504)
are tried again, after pauses that double and vary at random. All attempts carry the same `Idempotency-Key`,
by which a service recognises a repeated request. Any other status is an error at once.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast
from urllib.parse import urlsplit

from rlhf.config.section import masked_text
from rlhf.rewards.builtin import Completion, as_text, completion_text, conversation_text, is_conversation
from rlhf.rewards.signature import ALWAYS_GIVEN

TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
NO_COLUMNS = {*ALWAYS_GIVEN}
"""Arguments that are not columns of the dataset."""
LONGEST_ANSWER = 1 << 24
"""Bytes of a response that are read at most."""
_JITTER = random.Random()
"""A separate generator: random pauses must not change what is drawn from the seeded global one."""


class RemoteError(RuntimeError):
    """The service did not respond, or its response cannot be used."""


class NoVerdict(RemoteError):
    """The answer of a judge is complete as a response, but does not say what the judge thinks."""


class Client:
    """POSTs JSON to one address; keeps one connection open and opens a new one when that is lost."""

    _connection: http.client.HTTPConnection | None = None

    def __init__(
        self, url: str, *, headers: Mapping[str, str], seconds: float, attempts: int, pause: float
    ) -> None:
        """`seconds`: limit of one attempt; `attempts`: how many; `pause`: seconds before the second attempt.

        Raises ValueError when `url` is not an http or https address.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"expected an address like http://host:8000/score, got {masked_text(url)!r}")
        for name, value in headers.items():
            if not re.fullmatch(r"[!-~]+( +[!-~]+)*", str(value)):
                raise ValueError(f"the header {name} must be one line of printable ASCII characters")
        # for messages
        self.url = masked_text(url)
        self.headers = {"Content-Type": "application/json", **headers}
        self.seconds, self.attempts, self.pause = seconds, attempts, pause
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._place = parts.netloc.rpartition("@")[2]
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    @classmethod
    def of_chat(
        cls, url: str, *, key_variable: str | None, seconds: float, attempts: int, pause: float
    ) -> Client:
        """For the chat endpoint at `url`, without its ending `/chat/completions`.

        Raises what `Client` and `authorization` raise.
        """
        address, headers = url.rstrip("/") + "/chat/completions", authorization(key_variable)
        return cls(address, headers=headers, seconds=seconds, attempts=attempts, pause=pause)

    def __del__(self) -> None:
        self._drop()

    def post(self, payload: object) -> Any:
        """The decoded JSON of the response. Raises RemoteError, which says how the last attempt failed."""
        body = json.dumps(payload).encode()
        headers = {**self.headers, "Idempotency-Key": hashlib.sha256(body).hexdigest()}
        problem = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1) * _JITTER.uniform(0.5, 1.5))
            try:
                status, text = self._send(body, headers)
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                problem = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                return _decoded(self.url, text)
            problem = f"status {status}: {text[:500].decode(errors='replace')}"
            if status not in TRY_AGAIN:
                raise RemoteError(f"{self.url}: {problem}")
        raise RemoteError(f"{self.url}: no answer in {self.attempts} attempts, the last: {problem}")

    def _send(self, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = self._kind(self._place, timeout=self.seconds)
        self._connection.request("POST", self._path, body, dict(headers))
        response = self._connection.getresponse()
        text = response.read(LONGEST_ANSWER)
        if response.will_close or not response.isclosed():
            self._drop()
        return response.status, text

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


class RemoteReward:
    """Lets a service score: `{"samples": [{"prompt", "completion", ...columns}]}` -> `{"scores": [...]}`.

    The function's setting `batch` is the number of samples of one request, `workers` the number of requests
    under way at once. A score is a number, an object of numbers by objective, or null (does not apply).
    """

    def __init__(
        self,
        url: str,
        seconds: float = 5.0,
        attempts: int = 4,
        pause: float = 0.25,
        headers: Mapping[str, str] | None = None,
        key_variable: str | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        """`seconds`: limit of one attempt; `attempts`: how many; `pause`: seconds before the second attempt.

        `key_variable`: the environment variable whose value is sent as bearer token. `columns`: the columns
        of the dataset that are sent; all of them if not given. Raises ValueError when the variable is not
        set.
        """
        sent = {**(headers or {}), **authorization(key_variable)}
        self.client = Client(url, headers=sent, seconds=seconds, attempts=attempts, pause=pause)
        self.columns = None if columns is None else set(columns)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
    ) -> list[Any]:
        kept = {
            name: values
            for name, values in columns.items()
            if name not in NO_COLUMNS and (self.columns is None or name in self.columns)
        }
        samples = [
            {"prompt": p, "completion": completion_text(c), **{k: v[i] for k, v in kept.items()}}
            for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ]
        answer = self.client.post({"samples": samples})
        if not isinstance(answer, dict) or "scores" not in answer:
            raise RemoteError(f'{self.client.url} must answer {{"scores": [...]}}, got {answer!r:.200}')
        return cast(dict[str, Any], answer)["scores"]


JUDGE = """You judge an answer. Question:
{prompt}

Answer to judge:
{completion}

How good is the answer, from 0 (useless or wrong) to 10 (right and complete)? Think in a sentence or two,
then end with one line: Score: <number>"""


VERDICT = r"(?im)^[\s*_#>`]*(?:final\s+)?score[\s*_`]*[:=][\s*_`]*(-?\d+(?:\.\d+)?)(?:\s*/\s*\d+)?[\s*_`.]*\Z"
"""A score that is the whole last line, so that one which the judge quotes or thinks of does not count."""


class LLMJudge:
    """A language model behind an OpenAI-compatible endpoint; the reward is the score that ends its answer.

    Thoughts (up to the last `</think>`) are no part of the answer. An answer that is cut at `max_tokens`
    gives no score, because its verdict is missing.

    The completion is put into the judge's prompt unchanged. Words in it that address the judge can therefore
    raise the score, and a policy may learn to flatter: look at samples.
    """

    def __init__(
        self,
        url: str,
        model: str,
        template: str = JUDGE,
        pattern: str = VERDICT,
        low: float = 0.0,
        high: float = 10.0,
        max_tokens: int = 256,
        seconds: float = 30.0,
        attempts: int = 4,
        pause: float = 0.5,
        key_variable: str | None = None,
    ) -> None:
        """`url` without its ending `/chat/completions`.

        `template`: the judge's prompt, with the placeholders {prompt}, {completion} and any column of the
        dataset. `pattern`: the first group of its last match in the judge's answer is the score, which is
        scaled so that `low` becomes 0 and `high` becomes 1. The default asks for a last line `Score: 7`.

        Raises ValueError for a template without {completion}.
        """
        if "{completion}" not in template:
            raise ValueError("the judge's template must have {completion}, or it judges nothing")
        self.client = Client.of_chat(
            url, key_variable=key_variable, seconds=seconds, attempts=attempts, pause=pause
        )
        self.model, self.template, self.pattern = model, template, re.compile(pattern)
        self.low, self.high, self.max_tokens = low, high, max_tokens

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
    ) -> list[float]:
        scores: list[float] = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            given = {name: values[i] for name, values in columns.items() if name not in NO_COLUMNS}
            read = conversation_text if is_conversation(completion) else completion_text
            fields = {**given, "prompt": as_text(prompt), "completion": read(completion)}
            scores.append(self._score(filled(self.template, fields)))
        return scores

    def _score(self, text: str) -> float:
        payload = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
        }
        answer = self.client.post(payload)
        written, _ = judge_answer(answer, self.client.url, self.max_tokens)
        found = self.pattern.findall(written)
        if not found:
            raise NoVerdict(f"the judge's answer does not end with a score: {written[-300:]!r}")
        score = float(found[-1])
        if not self.low <= score <= self.high:
            raise RemoteError(f"the judge's score {score:g} lies outside {self.low:g} to {self.high:g}")
        return (score - self.low) / (self.high - self.low)


def judge_answer(answer: Any, url: str, max_tokens: int, who: str = "judge") -> tuple[str, Mapping[str, Any]]:
    """A judge's answer behind its thoughts, and the choice of the chat completion that it is part of.

    `who`: what messages call it. Raises NoVerdict when there is none, or it is cut, and RemoteError for what
    is no chat completion.
    """
    try:
        choice = answer["choices"][0]
        written = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise RemoteError(f"{url}: not a chat completion: {answer!r:.200}") from None
    if choice.get("finish_reason") == "length":
        raise NoVerdict(
            f"the {who}'s answer was cut at max_tokens = {max_tokens}, before its verdict; raise "
            f"max_tokens in params: {written!r:.200}"
        )
    thoughts, end, verdict = str(written or "").rpartition("</think>")
    if not verdict.strip() or (not end and "<think>" in verdict):
        raise NoVerdict(f"the {who} gave no answer beside its thoughts: {thoughts or verdict!r:.200}")
    return verdict, choice


def filled(template: str, fields: Mapping[str, Any]) -> str:
    """The template with each {name} of `fields` in its place; others stay.

    Not str.format, because a completion may contain braces itself.
    """
    return re.sub(r"\{(\w+)\}", lambda m: str(fields.get(m[1], m[0])), template)


def authorization(key_variable: str | None) -> dict[str, str]:
    """The header of a request with the key in this environment variable. Raises ValueError: it is not set."""
    if key_variable is None:
        return {}
    if not os.environ.get(key_variable):
        raise ValueError(f"the environment variable {key_variable}, named by key_variable, is not set")
    # a file that the variable was read from may have ended with a line end
    key = os.environ[key_variable].strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError(
            f"the environment variable {key_variable}, named by key_variable, must hold a key: one line of "
            "printable ASCII characters without blanks"
        )
    return {"Authorization": f"Bearer {key}"}


def _decoded(url: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RemoteError(f"{url} did not answer with JSON: {text[:200]!r}") from None
