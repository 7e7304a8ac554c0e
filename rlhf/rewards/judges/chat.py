"""Judge `pair_judge`: a language model behind an OpenAI-compatible endpoint names the better of two answers.

    reward:
      preference: {path: pair_judge, params: {url: "http://judge:8000/v1", model: some-judge}, timeout: 120}

P(A is better) = p(A) / (p(A) + p(B)), the probabilities of the two letters where the answer has its verdict
(as pair-pm of RLHFlow does with a model of its own, arXiv:2405.07863). With `logprobs: false` it is 1 or 0.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.rewards.builtin import Completion, as_text, compared_texts
from rlhf.rewards.remote import (
    NO_COLUMNS,
    Client,
    NoVerdict,
    RemoteError,
    filled,
    judge_answer,
)

TEMPLATE = """You compare two answers. Question:
{prompt}

Answer A:
{first}

Answer B:
{second}

Which answer is better? Think in a sentence or two, then end with one line, A or B: Better: <letter>"""
VERDICT = re.compile(r"(?im)^[\s*_#>`]*(?:better|verdict)[\s*_`]*[:=][\s*_`]*(?-i:([AB]))[\s*_`.]*\Z")
"""A verdict that is the whole last line, so that one which the judge quotes or thinks of does not count."""
AROUND = " \t\r\n*_`.:=\u2581\u0120"
"""What a token may have around its letter; the last two are how some servers write a space."""


class PairJudge:
    """Thoughts (up to the last `</think>`) are no part of the answer. No verdict, which leaves the duel out:
    an answer that is cut at `max_tokens`, has nothing behind its thoughts, or ends otherwise than with one.

    The completions are put into the judge's prompt unchanged, episodes as conversations. Words in them that
    address the judge can sway it.
    """

    def __init__(
        self,
        url: str,
        model: str,
        template: str = TEMPLATE,
        logprobs: bool = True,
        max_tokens: int = 256,
        seconds: float = 30.0,
        attempts: int = 4,
        pause: float = 0.5,
        key_variable: str | None = None,
    ) -> None:
        """`url` without its ending `/chat/completions`.

        `template`: the judge's prompt, with {first}, {second} and, if wanted, {prompt} and any column of the
        dataset; the answer has to end with a line `Better: A` or `Better: B`. `logprobs`: ask for log-probs.

        Raises ValueError for a template without {first} or {second}.
        """
        if "{first}" not in template or "{second}" not in template:
            raise ValueError("the judge's template must have {first} and {second}, or it compares nothing")
        self.client = Client.of_chat(
            url, key_variable=key_variable, seconds=seconds, attempts=attempts, pause=pause
        )
        self.model, self.template, self.logprobs, self.max_tokens = model, template, logprobs, max_tokens

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Sequence[Completion]], **columns: Any
    ) -> list[float | None]:
        verdicts: list[float | None] = []
        for i, (prompt, (first, second)) in enumerate(zip(prompts, completions, strict=True)):
            given = {name: values[i] for name, values in columns.items() if name not in NO_COLUMNS}
            compared = dict(zip(("first", "second"), compared_texts(first, second), strict=True))
            verdicts.append(
                self._ask(filled(self.template, {**given, "prompt": as_text(prompt), **compared}))
            )
        return verdicts

    def _ask(self, text: str) -> float | None:
        payload: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
        }
        if self.logprobs:
            payload |= {"logprobs": True, "top_logprobs": 5}
        answer = self.client.post(payload)
        try:
            written, choice = judge_answer(answer, self.client.url, self.max_tokens)
        except NoVerdict as reason:
            return _no_verdict(str(reason))
        found = VERDICT.search(written)
        if found is None:
            end = f"...{written[-200:]}" if len(written) > 200 else written
            return _no_verdict(f"the answer does not end with a line Better: A or Better: B: {end!r}")
        return self._probability(found[1], choice) if self.logprobs else float(found[1] == "A")

    def _probability(self, letter: str, choice: Mapping[str, Any]) -> float:
        """P(A) of the two letters, where `letter` stands last. Raises RemoteError: there are no log-probs."""
        given: Mapping[str, Any] = choice.get("logprobs") or {}
        tokens: Sequence[Mapping[str, Any]] = given.get("content") or ()
        place = next((t for t in reversed(tokens) if t["token"].strip(AROUND) == letter), None)
        if place is None:
            raise RemoteError(
                f"{self.client.url} gives no log-prob of the verdict {letter}: set logprobs: false in params "
                "for a verdict without a probability"
            )
        both = {"A": 0.0, "B": 0.0}
        for token in place.get("top_logprobs") or (place,):
            name = token["token"].strip(AROUND)
            if name in both:
                both[name] += math.exp(token["logprob"])
        if not both[letter]:
            both[letter] = math.exp(place["logprob"])
        # a letter that is not among the listed tokens has next to no probability
        return both["A"] / (both["A"] + both["B"]) if sum(both.values()) else float(letter == "A")


def _no_verdict(reason: str) -> None:
    """Says why in RUN/rewards.log, where everything goes that a worker prints."""
    sys.stdout.write(f"no verdict: {reason}\n")
