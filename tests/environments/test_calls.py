"""Parsers of calls, schemas and checks of arguments, results as messages."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from rlhf.environments.calls import Call, Malformed, Parsed, json_tags, parser_of, python
from rlhf.environments.observations import LONGEST, PNG, Texts, WrongAnswer
from rlhf.environments.protocol import Ending, Lost, Reply
from rlhf.environments.tools import DoesNotFit, fitted, schema_of
from rlhf.environments.wire import LONGEST_ANSWER, read, written
from tests.environments.asking import call

ADD = Call("add", {"a": 1, "b": 2})
ADDED = call("add", '{"a": 1, "b": 2}')
JSON_TAGS: dict[str, tuple[str, tuple[Call | Malformed, ...]]] = {
    "No call.": ("No call.", ()),
    f"First {ADDED} then\n{ADDED}.": ("First  then\n.", (ADD, ADD)),
    # the last tag may be missing: engines stop at it
    ADDED.removesuffix("</tool_call>"): ("", (ADD,)),
    "<tool_call>\n" + ADDED[11:-12] + "\n</tool_call><|im_end|>": ("<|im_end|>", (ADD,)),
    # a closing tag in a text does not end the call
    call("say", '{"text": "</tool_call>"}'): ("", (Call("say", {"text": "</tool_call>"}),)),
    call("say", '{"text": "<think>"}') + ADDED: ("", (Call("say", {"text": "<think>"}), ADD)),
    # as the API of OpenAI writes arguments
    '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}</tool_call>': ("", (ADD,)),
    '<tool_call>{"name": "now"}</tool_call>': ("", (Call("now", {}),)),
    # a thought is no call, wherever it begins
    f"<think>I write {ADDED}</think>Done.": (f"<think>I write {ADDED}</think>Done.", ()),
    f"I write {ADDED}</think>{ADDED}": (f"I write {ADDED}</think>", (ADD,)),
    f"<think>I never end {ADDED}": (f"<think>I never end {ADDED}", ()),
    f"<think>a</think>{ADDED}<think>{ADDED}</think>": (f"<think>a</think><think>{ADDED}</think>", (ADD,)),
    "<tool_call>add(1, 2)</tool_call>" + ADDED: (
        "<tool_call>add(1, 2)</tool_call>",
        (Malformed("the call is not JSON: Expecting value"), ADD),
    ),
    "<tool_call>[1]</tool_call>": (
        "<tool_call>[1]</tool_call>",
        (Malformed('a call must be {"name": ..., "arguments": {...}}, got list [1]'),),
    ),
    '<tool_call>{"arguments": {}}</tool_call>': (
        '<tool_call>{"arguments": {}}</tool_call>',
        (Malformed('a call must have a text as "name"'),),
    ),
    call("add", "[1, 2]"): (
        call("add", "[1, 2]"),
        (Malformed("the arguments must be an object, got list [1, 2]", "add"),),
    ),
    call("add", '{"a": NaN}'): (
        call("add", '{"a": NaN}'),
        (Malformed("the call is not JSON: NaN is no JSON"),),
    ),
    "<tool_call>{} {}</tool_call>": (
        "<tool_call>{} {}</tool_call>",
        (Malformed("there is more than one JSON object in the call"),),
    ),
    "<tool_call>": ("<tool_call>", (Malformed("the call is not JSON: Expecting value"),)),
}


@pytest.mark.parametrize("text", JSON_TAGS)
def test_calls_in_tags(text: str) -> None:
    assert json_tags(text) == Parsed(*JSON_TAGS[text])


def test_what_is_nested_too_deeply_is_malformed() -> None:
    for parse, text in ((json_tags, "<tool_call>" + "[" * 100_000), (python, "[f(a=" + "[" * 100_000 + "]")):
        ((malformed,),) = (parse(text).calls,)
        assert isinstance(malformed, Malformed)
        assert len(malformed.reason) < 300


PYTHON: dict[str, tuple[str, tuple[Call | Malformed, ...]]] = {
    "[add(a=1, b=2)]": ("", (ADD,)),
    "Now:\n [add(a=1, b=2), now()]<|eot_id|>": ("Now:\n <|eot_id|>", (ADD, Call("now", {}))),
    "[f(x=-1.5, y=[True, None, 'a]b'], z={'k': (1, 2)})]": (
        "",
        (Call("f", {"x": -1.5, "y": [True, None, "a]b"], "z": {"k": [1, 2]}}),),
    ),
    "The list [1, 2] and [a link](there).": ("The list [1, 2] and [a link](there).", ()),
    "<think>\n[add(a=1, b=2)]\n</think>No.": ("<think>\n[add(a=1, b=2)]\n</think>No.", ()),
    "[add(1, 2)]": ("", (Malformed("name each argument, as in [name(argument=value)]", "add"),)),
    "[add(a=__import__('os'), b=2)]": (
        "",
        (Malformed("the argument a must be a literal: malformed node or string", "add"),),
    ),
    "[add(a=1, b=2": ("[add(a=1, b=2", (Malformed("the list of calls has no closing ]"),)),
    "[add(a=1 b=2)]": (
        "[add(a=1 b=2)]",
        (Malformed("the list of calls is not Python: invalid syntax. Perhaps you forgot a comma?"),),
    ),
}


@pytest.mark.parametrize("text", PYTHON)
def test_calls_in_python(text: str) -> None:
    parsed = python(text)
    content, calls = PYTHON[text]
    assert parsed.content == content
    # Python says where in its memory a node is
    shown = [
        Malformed(c.reason.split(" on line")[0].split(": <")[0], c.name) if isinstance(c, Malformed) else c
        for c in parsed.calls
    ]
    assert tuple(shown) == calls


def test_calls_found_by_a_function_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def find(text):\n"
        "    if text == 'bad': raise ValueError('no verb')\n"
        "    if text == 'wrong': return [7]\n"
        "    return [{'name': w, 'arguments': {}} if w != 'x' else {'error': 'x?'} for w in text.split()]\n"
    )
    parse = parser_of(f"{tmp_path / 'mine.py'}:find")
    assert parse("go x") == Parsed("go x", (Call("go", {}), Malformed("x?")))
    assert parse("bad") == Parsed("bad", (Malformed("no verb"),))
    with pytest.raises(TypeError, match=r"mine\.py:find must return calls as .* got 7"):
        parse("wrong")


def tool(
    count: int,
    share: float,
    kind: Literal["a", "b"],
    words: list[str],
    pair: tuple[int, str],
    maybe: int | None = None,
    either: int | list[int] = 0,
    table: dict[str, float] | None = None,
) -> None:
    """Does it.

    Args:
        count: One.
        share: Two.
        kind: Three.
        words: Four.
        pair: Five.
        maybe: Six.
        either: Seven.
        table: Eight.
    """


GIVEN = {"count": 1, "share": 0.5, "kind": "a", "words": ["x"], "pair": [1, "y"]}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a text for a number": ({"count": "1"}, "count must be a whole number, got '1'"),
    "a half for a whole number": ({"count": 1.5}, "count must be a whole number, got 1.5"),
    "true for a number": ({"count": True}, "count must be a whole number, got True"),
    "nothing for a number": ({"count": None}, "count must be a whole number, got None"),
    "infinity": ({"share": float("inf")}, "share must be a number, got inf"),
    "too large": ({"share": 10**400}, "share is too large for a number"),
    "another choice": ({"kind": "c"}, "kind must be one of 'a', 'b', got 'c'"),
    "an entry of another type": ({"words": ["x", 2]}, "words[1] must be a text, got 2"),
    "too few entries": ({"pair": [1]}, "pair must have 2 entries, got 1"),
    "no option fits": ({"either": "x"}, "either has a type that does not fit, got 'x'"),
    "an entry of a table": ({"table": {"k": "v"}}, "table['k'] must be a number, got 'v'"),
    "unknown": (
        {"cuont": 1},
        "tool has no argument 'cuont' (did you mean 'count'?); its arguments: count, share, kind, words, "
        "pair, maybe, either, table",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_do_not_fit_are_refused_in_words_for_the_policy(case: str) -> None:
    arguments, message = WRONG[case]
    with pytest.raises(DoesNotFit) as refused:
        fitted(GIVEN | arguments, schema_of(tool, "tool tool"))
    assert str(refused.value) == message


def test_arguments_that_fit_are_given_in_the_types_of_the_hints() -> None:
    schema = schema_of(tool, "tool tool")
    given = fitted(
        GIVEN | {"count": 2.0, "share": 1, "either": [1, 2], "maybe": None, "table": {"k": 3}}, schema
    )
    assert given == {
        "count": 2,
        "share": 1.0,
        "kind": "a",
        "words": ["x"],
        "pair": (1, "y"),
        "either": [1, 2],
        "maybe": None,
        "table": {"k": 3.0},
    }
    assert (type(given["count"]), type(given["share"]), type(given["table"]["k"])) == (int, float, float)
    with pytest.raises(DoesNotFit, match="tool needs the argument 'pair'"):
        fitted({key: value for key, value in GIVEN.items() if key != "pair"}, schema)


def test_results_are_text_json_or_parts() -> None:
    texts = Texts()
    assert texts.of_result("as it is\n") == "as it is\n"
    assert texts.of_result({"ü": [1, None, True]}) == '{"ü": [1, null, true]}'
    assert texts.of_result(np.array([1.5, 2.0])) == "[1.5, 2.0]"
    assert texts.of_result({"kept": {3, 1, 2}}) == '{"kept": [1, 2, 3]}'
    assert texts.of_result([{"type": "text", "text": "a\ud800"}]) == [{"type": "text", "text": "a\ufffd"}]
    assert texts.truncated == 0
    assert texts.of("x" * (LONGEST + 5)) == "x" * LONGEST + "\n[5 more characters are left out]"
    assert texts.truncated == 1


def test_images_become_png_and_pass_the_wire(tmp_path: Path) -> None:
    red = Image.new("RGB", (2, 1), (255, 0, 0))
    red.save(tmp_path / "red.bmp")
    file = (tmp_path / "red.bmp").read_bytes()
    texts = Texts()
    for image in (red, str(tmp_path / "red.bmp"), tmp_path / "red.bmp", file):
        (message,) = texts.messages(
            [{"type": "image", "image": image}, {"type": "text", "text": "Red."}], "reset"
        )
        png, text = message["content"]
        assert png["image"].startswith(PNG)
        assert Image.open(io.BytesIO(png["image"])).getpixel((1, 0)) == (255, 0, 0)
        assert text == {"type": "text", "text": "Red."}
        reply = Reply((message,), calls=1)
        assert through_the_wire(reply) == reply
        # what is a PNG already is not written anew
        assert texts.of_result([png]) == [png]
    with pytest.raises(WrongAnswer, match=r"the image '/none\.png' cannot be read"):
        texts.of_parts([{"type": "image", "image": "/none.png"}])


def through_the_wire(outcome: Reply | Ending | Lost) -> Any:
    answer = json.loads(written(7, outcome, "environment E"))
    assert answer["call"] == 7
    return read(answer, Ending if isinstance(outcome, Ending) else Reply)


def test_outcomes_pass_the_wire_and_are_not_too_long() -> None:
    for outcome in (
        Reply(
            ({"role": "tool", "name": "f", "content": "\u2028é"},),
            {"role": "assistant", "content": ""},
            1,
            2,
            3,
            4,
        ),
        Ending({"a": 1.0}, {"x": [1, {"y": None}]}),
        Ending(),
        Lost("value", "why", "where"),
    ):
        assert through_the_wire(outcome) == outcome
    image = {"type": "image", "image": PNG + bytes(LONGEST_ANSWER)}
    with pytest.raises(WrongAnswer, match="environment E answered with 16 MiB, more than the 12 MiB allowed"):
        written(1, Reply(({"role": "user", "content": [image]},)), "environment E")
    with pytest.raises(WrongAnswer, match="messages must hold what JSON can hold, got object"):
        written(1, Reply(({"role": "user", "content": "", "more": object()},)), "environment E")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (7, "respond must return a text, messages, parts of a message or None, got int 7"),
        ([{"role": "robot", "content": "x"}], "the role of a message of respond must be one of user, tool"),
        ({"role": "user"}, "the content of a message of respond must be text or parts, got None"),
        ([{"type": "video", "video": "x"}], "the role of a message of respond must be one of"),
        (["text"], "respond must return messages, got 'text'"),
    ],
)
def test_what_is_no_message_is_refused(returned: object, message: str) -> None:
    with pytest.raises(WrongAnswer) as refused:
        Texts().messages(returned, "respond")
    assert str(refused.value).startswith(message)
