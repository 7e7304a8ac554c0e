"""The part of a report with completions: rewards by objective, tokens coloured by advantage or entropy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, cast

Record = Mapping[str, Any]

GROUPS = 16
"""Groups that are shown of a run: those of its first and its last step, and some in between."""
COMPLETIONS = 8
"""Completions that are shown of a group."""
TOKENS = 24_000
"""Tokens that are coloured on a page; each adds about 60 bytes to it."""

STYLE = """
details { border-top: 1px solid var(--line); padding: .3rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
summary small { opacity: .75; } .tokens i { font-style: normal; }
.paint { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .8rem 0; padding: 0; border: 0; }
:root { --up: #10b981; --down: #ef4444; --open: #f59e0b; }
body:has(#by-advantage:checked) .tokens .u {
  background: color-mix(in srgb, var(--up) calc(var(--a) * 70%), transparent); }
body:has(#by-advantage:checked) .tokens .d {
  background: color-mix(in srgb, var(--down) calc(var(--a) * 70%), transparent); }
body:has(#by-entropy:checked) .tokens i {
  background: color-mix(in srgb, var(--open) calc(var(--e, 0) * 80%), transparent); }
.observed { opacity: .7; border-left: 3px dashed var(--line); margin: .3rem 0 .3rem 1.2rem;
  padding-left: .6rem; white-space: pre-wrap; }
body:has(#by-nothing:checked) .scale, body:has(#by-advantage:checked) .scale.e,
body:has(#by-entropy:checked) .scale.a { display: none; }
"""
PAINT = """<fieldset class="paint">Tokens coloured by
<label><input type="radio" name="paint" id="by-advantage" checked> advantage</label>
<label><input type="radio" name="paint" id="by-entropy"> entropy</label>
<label><input type="radio" name="paint" id="by-nothing"> nothing</label>
<small class="scale a">green: positive advantage (better than expected), red: negative</small>
<small class="scale e">the stronger, the less certain the policy was of this token</small></fieldset>"""


def browser(groups: Sequence[Record]) -> str:
    """HTML of the groups; empty without groups. The page needs `STYLE`, and `PAINT` once."""
    tokens_left = TOKENS
    parts: list[str] = []
    for number, group in enumerate(groups):
        shown = group["completions"][:COMPLETIONS]
        drawn: list[str] = []
        for completion in shown:
            tokens_left -= len(completion.get("tokens", ()))
            drawn.append(_completion(completion, coloured=tokens_left >= 0))
        parts.append(_group(group, drawn, is_open=number in (0, len(groups) - 1)))
    return "".join(parts)


def lengths_of(groups: Iterable[Record]) -> list[int]:
    """The number of tokens of each recorded completion."""
    return [c["num_tokens"] for group in groups for c in group["completions"] if "num_tokens" in c]


def _group(group: Record, completions: Sequence[str], *, is_open: bool) -> str:
    rewards = [c["reward"] for c in group["completions"]]
    shown_rewards = " ".join(
        "none" if reward is None else f"{reward:.2f}" for reward in rewards[:COMPLETIONS]
    )
    more = len(rewards) - len(completions)
    prompt = escape(_shorten(text_of(group["prompt"])))
    head = f"step {group['step']}: {prompt} <small>rewards {shown_rewards}</small>"
    left_out = f'<p class="note">{more} more completions were sampled.</p>' if more > 0 else ""
    return (
        f"<details{' open' if is_open else ''}><summary>{head}</summary>"
        f'<div class="question">{_prompt(group["prompt"])}</div>'
        f'<div class="completions">{"".join(completions)}</div>{left_out}</details>'
    )


def _prompt(prompt: str | Sequence[Record]) -> str:
    if isinstance(prompt, str):
        return escape(prompt)
    return "\n".join(f"<small>{escape(str(m['role']))}</small> {escape(str(m['content']))}" for m in prompt)


def _completion(completion: Record, *, coloured: bool) -> str:
    tokens = list(_tokens(completion)) if coloured and completion.get("tokens") else []
    if completion.get("messages"):
        body = "".join(_turns(completion, tokens))
    else:
        body = _quote("".join(tokens) or escape(completion["text"]))
    return f"<div><small>{escape(_head(completion))}</small>{body}</div>"


def _quote(body: str) -> str:
    return f'<blockquote class="tokens">{body}</blockquote>'


def _turns(completion: Record, tokens: Sequence[str]) -> Iterator[str]:
    """The policy's turns in an episode, tokens coloured, and what the environment answered between them."""
    messages: Sequence[Record] = completion["messages"]
    parts, number = iter(_parts(completion, tokens)), 0
    for message in messages:
        text = escape(_content(message))
        if message["role"] == "assistant":
            body, advantage = next(parts, ("", None))
            called = [escape(_call(call)) for call in message.get("tool_calls", ())]
            calls = "".join(f"<small>calls {call}</small><br>" for call in called)
            number += 1
            head = f"turn {number}" + ("" if advantage is None else f" · advantage {advantage:+.2f}")
            yield f"<div><small>{head}</small></div>{_quote(body or text)}{calls}"
        else:
            name = f" {message['name']}" if message.get("name") else ""
            yield f'<div class="observed"><small>{escape(message["role"] + name)}</small> {text}</div>'


def _parts(completion: Record, tokens: Sequence[str]) -> Iterator[tuple[str, float | None]]:
    """The policy's turns, as coloured tokens, and the advantage of each, if its tokens have the same."""
    start, given = 0, completion.get("advantage")
    for length, own in completion.get("parts", ()):
        turn = slice(start, start + length)
        if own:
            found = {*cast(list[float], given)[turn]} if isinstance(given, list) else {given}
            yield "".join(tokens[turn]), found.pop() if len(found) == 1 else None
        start += length


def _content(message: Record) -> str:
    content: Any = message.get("content")
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "[image]")) for part in content or ())


def _call(call: Record) -> str:
    function: Record = call.get("function", call)
    arguments = ", ".join(f"{key}={value!r}" for key, value in dict(function.get("arguments", {})).items())
    return f"{function.get('name')}({arguments})"


def _head(completion: Record) -> str:
    parts = [reward_text(completion)]
    objectives: Record = completion.get("objectives", {})
    if len(objectives) > 1:
        values = ((name, "none" if value is None else f"{value:.2f}") for name, value in objectives.items())
        parts.append(", ".join(f"{name} {value}" for name, value in values))
    advantage = completion.get("advantage")
    if isinstance(advantage, int | float):
        parts.append(f"advantage {advantage:+.2f}")
    if "source" in completion:
        parts.append(f"from the {completion['source']}")
    if "num_tokens" in completion:
        parts.append(f"{completion['num_tokens']} tokens")
    if completion.get("finish_reason") == "length":
        parts.append("cut at the token limit")
    return " · ".join(parts)


def _tokens(completion: Record) -> Iterator[str]:
    tokens: Sequence[str] = completion["tokens"]
    advantage: Any = completion.get("advantage", 0.0)
    advantages: Sequence[float] = [advantage] * len(tokens)
    if isinstance(advantage, list):
        advantages = cast(list[float], advantage)
    entropies: Sequence[float | None] = completion.get("entropy") or [None] * len(tokens)
    for token, a, e in zip(tokens, advantages, entropies, strict=True):
        # the strongest colour stands for an advantage of 2 and more, or an entropy of 2 nats and more
        style = f"--a:{min(1.0, abs(a) / 2):.2g}" + ("" if e is None else f";--e:{min(1.0, e / 2):.2g}")
        title = f"advantage {a:+.2f}" + ("" if e is None else f", entropy {e:.2f}")
        kind = "u" if a > 0 else "d" if a < 0 else "z"
        yield f'<i class="{kind}" style="{style}" title="{title}">{escape(token)}</i>'


def reward_text(sample: Record) -> str:
    return "no reward" if sample["reward"] is None else f"reward {sample['reward']:.2f}"


def text_of(prompt: str | Sequence[Record]) -> str:
    """The prompt as text; of a chat, its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:79] + "…"
