"""What stands between two turns: by the chat template, whatever it can write, or a refusal that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf.environments.conversation import Conversation, ConversationError
from rlhf.models.chat import ChatError, set_variables

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MESSAGE = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
NO_TOOL_ROLE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    + MESSAGE
    + "{% endfor %}"
    + OPENING
)
SILENT_ABOUT_RESULTS = (
    "{% for m in messages %}{% if m.role != 'tool' %}" + MESSAGE + "{% endif %}{% endfor %}" + OPENING
)
FORGETS_THOUGHTS = (
    "{% for m in messages %}{% set own = m.role == 'assistant' %}"
    "{% set c = m.content.split('</think>')[-1] if own else m.content %}"
    "<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + NO_TOOL_ROLE.replace("no tools", "none")
SPACE_BEFORE_THE_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} <|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def conversation(folder: Path, template: str) -> Conversation:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return Conversation(tokenizer, frozenset([2]))


def observed(own: Conversation, *messages: dict[str, Any], last: int = 2) -> str:
    tokenizer: Any = own.tokenizer
    return tokenizer.decode(own.observation(messages, last).token_ids)


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "add", "content": text}


@pytest.mark.parametrize("template", [NO_TOOL_ROLE, SILENT_ABOUT_RESULTS])
def test_a_template_without_results_has_the_user_tell_them(tiny_model_dir: Path, template: str) -> None:
    own = conversation(tiny_model_dir, template)
    assert observed(own, result("12")) == (
        "\n<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_turn_that_a_stop_token_ended_gets_its_end_from_the_template(tiny_model_dir: Path) -> None:
    own = conversation(tiny_model_dir, NO_TOOL_ROLE)
    user = {"role": "user", "content": "No"}
    behind = "\n<|im_start|>user\nNo<|im_end|>\n<|im_start|>assistant\n"
    assert observed(own, user, last=30) == "<|im_end|>" + behind
    assert observed(own, user, last=2) == behind
    spaced = conversation(tiny_model_dir, SPACE_BEFORE_THE_END)
    assert observed(spaced, user) == "user: No <|im_end|>assistant:"


def test_tools_are_told_in_the_system_message_where_the_template_writes_none(tiny_model_dir: Path) -> None:
    own = conversation(tiny_model_dir, NO_TOOL_ROLE)
    user, system = {"role": "user", "content": "x"}, {"role": "system", "content": "Be brief."}
    told: Any = own.told_tools([user], [TOOL])
    assert told[0]["role"] == "system" and '"name": "add"' in told[0]["content"] and told[1] == user
    told = own.told_tools([system, user], [TOOL])
    assert told[0]["content"].startswith("Be brief.\n\nYou can call these tools:") and len(told) == 2
    writes = conversation(tiny_model_dir, WITH_TOOLS)
    assert writes.told_tools([user], [TOOL]) == [user]


def test_a_template_that_forgets_thoughts_is_refused_unless_there_are_none(tiny_model_dir: Path) -> None:
    with pytest.raises(ConversationError, match=r"removes the thoughts of earlier turns.*enable_thinking"):
        conversation(tiny_model_dir, FORGETS_THOUGHTS).check(roles=["user"])
    without = set_variables(FORGETS_THOUGHTS, {"enable_thinking": False})
    conversation(tiny_model_dir, without).check(roles=["user", "tool"])
    conversation(tiny_model_dir, NO_TOOL_ROLE).check(roles=["user", "tool"])


def test_a_template_of_one_turn_is_refused(tiny_model_dir: Path) -> None:
    last_only = "{{ messages[-1].content }}" + OPENING
    with pytest.raises(ConversationError, match="what the assistant said before"):
        conversation(tiny_model_dir, last_only).check(roles=["user"])


def test_variables_of_a_template(tiny_model_dir: Path) -> None:
    template = "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}" + NO_TOOL_ROLE
    user = [{"role": "user", "content": "x"}]
    for value in (False, 3, "a'b\"c"):
        own = conversation(tiny_model_dir, set_variables(template, {"enable_thinking": value}))
        tokenizer: Any = own.tokenizer
        assert tokenizer.decode(own.prompt(user, None)).startswith(f"{value}<|im_start|>user")
    assert set_variables({"default": template}, {"enable_thinking": 1})["default"].endswith(template)
    with pytest.raises(ChatError, match="reads no variable 'thinking'"):
        set_variables(template, {"thinking": False})
    with pytest.raises(ChatError, match="must be true, false, a number or a text"):
        set_variables(template, {"enable_thinking": [1]})
