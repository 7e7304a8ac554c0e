"""Judges of a conversation's goals: which turns begin a new goal, which failed, and why (Mind the Goal).

A turn is a message of the user with all that the assistant and its tools say until the next one. A judge says
of each turn whether the user begins a new goal with it, whether the assistant served it, and if not, the code
of the root cause (RCOF). `GoalJudge` asks a chat endpoint; any function `judge(conversations)` that returns a
list of such dicts for each conversation, or None, will do:

    [{"new_goal": True, "success": False, "code": "E4"}, {"new_goal": False, "success": True}]

The reward `goal` is 1 where no turn failed and 0 where one did: then, and only then, each goal succeeded.

Source: arXiv:2510.03696. Differences from its published code: 1. an answer that leaves out a turn or what
became of it is no verdict, where the code takes the turn for a success; 2. the wording of the judge's prompt.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from rlhf.rewards.builtin import Completion, message_line
from rlhf.rewards.remote import Client, NoVerdict, filled, judge_answer
from rlhf.rewards.workers.return_values import WrongReturn, read_values

Message = Mapping[str, Any]
Vote = TypeVar("Vote")
CODES = {
    "E1": "language understanding: the assistant misread what the user wants",
    "E2": "refusal: it declined what it could have done",
    "E3": "incorrect retrieval: it looked up, or told, the wrong thing",
    "E4": "retrieval failure: it found nothing where there is something",
    "E5": "system error: a tool or service broke",
    "E6": "incorrect routing: it called the wrong tool or handed over to the wrong place",
    "E7": "out of domain: the user asked for what the assistant is not there for",
}
"""Root causes of failure, by their codes."""
TEMPLATE = """You judge how an assistant served its user. The conversation has {count} turns. A turn is one
message of the user, with all that the assistant and its tools say up to the next one.

{conversation}

For each turn, say
- new_goal: "yes" if the user begins a new goal with it, "no" if it goes on with the goal of the turn before
  (a correction, a detail, a repetition). The first turn begins a goal.
- quality: "success" if the assistant served the turn rightly and completely, otherwise "failure".
- rcof: null for a success, and for a failure the code of its root cause:
{codes}

Think briefly, then end with a JSON list of one object for each turn:
[{"turn": 1, "new_goal": "yes", "quality": "success", "rcof": null}, ...]"""
WORDS = {"yes": True, "no": False, "true": True, "false": False, "success": True, "failure": False}


@dataclass(frozen=True, slots=True)
class TurnVerdict:
    """What a judge says of one turn; example: `TurnVerdict(True, False, "E4")`."""

    new_goal: bool
    success: bool
    code: str | None = None
    """The root cause of a failure, a key of `CODES`; None: a success, or no known code was given."""


Judge = Callable[[Sequence[Sequence[Message]]], Sequence[Sequence[TurnVerdict] | None]]
"""Verdicts on the turns of each conversation; None: the judge has none."""


def turns_of(conversation: Sequence[Message]) -> list[list[Message]]:
    """The messages of each turn; several messages of the user in a row begin one turn, the system none."""
    turns: list[list[Message]] = []
    before = ""
    for message in conversation:
        role = str(message["role"])
        if role == "user" and before != "user":
            turns.append([])
        if turns:
            turns[-1].append(message)
        before = role
    return turns


def majority(answers: Sequence[Sequence[TurnVerdict]]) -> list[TurnVerdict] | None:
    """What most of several answers on one conversation say of each turn; None where one turn has a tie.

    The code is that of most of the answers that see a failure; None where no code has most of them.
    """
    found: list[TurnVerdict] = []
    for votes in zip(*answers, strict=True):
        decided = [_most([vote.new_goal for vote in votes]), _most([vote.success for vote in votes])]
        if None in decided:
            return None
        new_goal, success = decided
        codes = [vote.code for vote in votes if not vote.success]
        found.append(TurnVerdict(bool(new_goal), bool(success), None if success else _most(codes)))
    return found


def read_judge(function: Callable[..., Any]) -> Judge:
    """`function(conversations)`, which returns dicts, as a `Judge`. The judge raises WrongReturn."""

    def judge(conversations: Sequence[Sequence[Message]]) -> list[list[TurnVerdict] | None]:
        returned = read_values(function(conversations), len(conversations), "lists, one a conversation")
        pairs = zip(returned, conversations, strict=True)
        return [None if value is None else _read(value, len(turns_of(c))) for value, c in pairs]

    return judge


def _read(value: Any, count: int) -> list[TurnVerdict]:
    try:
        return _verdicts(value, count)
    except NoVerdict as error:
        raise WrongReturn(f"a judge of goals returns a dict for each turn: {error}") from None


class Asked:
    """A language model behind an OpenAI-compatible endpoint, asked once for each conversation.

    The conversation is put into the judge's prompt unchanged: words in it can sway the judge.
    """

    def __init__(
        self,
        url: str,
        model: str,
        template: str = TEMPLATE,
        temperature: float = 0.0,
        sample: int | None = None,
        max_tokens: int = 4096,
        seconds: float = 60.0,
        attempts: int = 4,
        pause: float = 0.5,
        key_variable: str | None = None,
    ) -> None:
        """`url` without its ending `/chat/completions`. `template`: the judge's prompt, with {conversation},
        and {count} and {codes} where wanted. `sample`: the seed that is sent, so that one model at a
        `temperature` above 0 can have several votes.

        Raises ValueError for a template without {conversation}.
        """
        if "{conversation}" not in template:
            raise ValueError("the judge's template must have {conversation}, or it judges nothing")
        self.client = Client.of_chat(
            url, key_variable=key_variable, seconds=seconds, attempts=attempts, pause=pause
        )
        self.template, self.max_tokens = template, max_tokens
        seed = {} if sample is None else {"seed": sample}
        self._settings = {"model": model, "temperature": temperature, "max_tokens": max_tokens, **seed}

    def verdicts(self, conversation: Sequence[Message]) -> list[TurnVerdict]:
        """A verdict on each turn.

        Raises NoVerdict for an answer that is cut at `max_tokens`, is all thoughts, or does not say of each
        turn what became of it; RemoteError when the endpoint does not answer.
        """
        turns = turns_of(conversation)
        if not turns:
            return []
        codes = "\n".join(f"  {code} {meaning}" for code, meaning in CODES.items())
        fields = {"count": len(turns), "conversation": written(turns), "codes": codes}
        prompt = filled(self.template, fields)
        answer = self.client.post({**self._settings, "messages": [{"role": "user", "content": prompt}]})
        text, _ = judge_answer(answer, self.client.url, self.max_tokens)
        return _verdicts(list(_objects(text)), len(turns))


class GoalJudge(Asked):
    """A `Judge`: None for a conversation on which the endpoint's answer is no verdict."""

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[list[TurnVerdict] | None]:
        """Raises RemoteError when the endpoint does not answer."""
        found: list[list[TurnVerdict] | None] = []
        for conversation in conversations:
            try:
                found.append(self.verdicts(conversation))
            except NoVerdict:
                found.append(None)
        return found


class GoalReward(Asked):
    """The reward `goal`: 1 where the judge finds no turn that failed, 0 where it finds one."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Completion], **_: Any) -> list[float]:
        """Raises RemoteError as `verdicts` does: the sample then has no reward."""
        rewards: list[float] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            verdicts = self.verdicts([*_messages(prompt, "user"), *_messages(completion, "assistant")])
            rewards.append(float(all(verdict.success for verdict in verdicts)))
        return rewards


def written(turns: Sequence[Sequence[Message]]) -> str:
    """The turns as a judge reads them."""
    return "\n\n".join(
        "\n".join([f"Turn {number}", *map(message_line, turn)]) for number, turn in enumerate(turns, start=1)
    )


def _messages(given: Any, role: str) -> Sequence[Message]:
    return [{"role": role, "content": given}] if isinstance(given, str) else cast(Sequence[Message], given)


def _objects(text: str) -> Iterator[Any]:
    """The objects of the last JSON list in `text`, or of all JSON objects in it where there is no list."""
    decoder, values, place = json.JSONDecoder(), list[Any](), 0
    for found in re.finditer(r"[\[{]", text):
        if found.start() < place:
            continue
        try:
            value, place = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            continue
        values.append(value)
    lists = [cast(list[Any], value) for value in values if isinstance(value, list) and value]
    yield from lists[-1] if lists else (value for value in values if isinstance(value, dict))


def _verdicts(value: Any, count: int) -> list[TurnVerdict]:
    """One verdict a turn, in order. Raises NoVerdict, which says what is missing."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    entries: list[Any] = list(cast(Sequence[Any], value)) if several else [cast(Any, value)]
    if len(entries) != count:
        raise NoVerdict(f"{len(entries)} verdicts on {count} turns")
    verdicts: dict[int, TurnVerdict] = {}
    for place, entry in enumerate(entries, start=1):
        if isinstance(entry, TurnVerdict):
            verdicts[place] = entry
            continue
        if not isinstance(entry, Mapping):
            raise NoVerdict(f"a verdict on a turn is an object, got {entry!r:.80}")
        said = cast(Mapping[str, Any], entry)
        number = _first(said, "turn", "turn_number")
        success = _yes(_first(said, "success", "quality"))
        if success is None:
            raise NoVerdict(f"no word on whether turn {place} is a success or a failure: {said!r:.120}")
        new_goal = _yes(_first(said, "new_goal", "is_new_goal"))
        code = re.search(r"\bE[1-7]\b", str(_first(said, "code", "rcof")))
        known = None if success or code is None else code[0]
        # the paper's code too takes a turn for a new goal if nothing is said
        verdicts[int(number) if re.fullmatch(r"\d+", str(number)) else place] = TurnVerdict(
            new_goal is not False, success, known
        )
    if sorted(verdicts) != list(range(1, count + 1)):
        raise NoVerdict(f"verdicts on turns {sorted(verdicts)}, where there are {count}")
    return [verdicts[place] for place in range(1, count + 1)]


def _first(said: Mapping[str, Any], *names: str) -> Any:
    return next((said[name] for name in names if name in said), None)


def _yes(value: Any) -> bool | None:
    return value if isinstance(value, bool) else WORDS.get(str(value).strip().lower())


def _most(votes: Sequence[Vote]) -> Vote | None:
    """What more of the votes say than anything else; None for a tie or without votes."""
    leading = Counter(votes).most_common(2)
    tied = len(leading) == 2 and leading[0][1] == leading[1][1]
    return None if tied or not leading else leading[0][0]
