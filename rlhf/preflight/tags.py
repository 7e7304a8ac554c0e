"""Tags such as `<think>` that reward functions would not see, and what is done or said about them.

Two kinds are missing from the text of a completion: tags that are special tokens of the tokenizer, which are
dropped with all other special tokens unless `reward.special_tokens` is `keep`; and a tag that the chat
template opens at the end of the prompt, because the completion then begins inside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from rlhf.config.reward import RewardFunction
from rlhf.config.run import Config
from rlhf.inputs import Inputs
from rlhf.models.pretrained import decoded
from rlhf.types import Prompt

FORMAT_MATCH = ("format_match", "rlhf.rewards.builtin:format_match")
EXAMINED = 64
"""Prompts that are examined at most."""
TAIL = 16
"""Tokens at the end of a prompt among which an opening tag is looked for."""
TAG = re.compile(r"</?[A-Za-z][\w-]*>|\[/?[A-Z][A-Z_]*\]")
OPENED = re.compile(r"(<[A-Za-z][\w-]*>|\[[A-Z][A-Z_]*\])\s*$")


def ends_of(tokenizer: Any, eos_token_ids: Sequence[int]) -> frozenset[int]:
    """Ids of the tokens that begin, end or pad a sequence."""
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return frozenset({*eos_token_ids, *(token_id for token_id in named if token_id is not None)})


def opened_tag(prompts: Sequence[Prompt], tokenizer: Any) -> str:
    """The tag with which every prompt ends, such as `<think>`; empty if there is none."""
    found = [OPENED.search(decoded(tokenizer, p.token_ids[-TAIL:], ())) for p in prompts[:EXAMINED]]
    tags = {match[1] if match else "" for match in found}
    return tags.pop() if len(tags) == 1 else ""


def with_opened(function: RewardFunction, opened: str) -> dict[str, Any]:
    """The function's settings; `format_match` of tags of which the prompt opens the first is told so."""
    settings = function.model_dump()
    tags = settings["params"].get("pattern")
    if function.path in FORMAT_MATCH and isinstance(tags, list) and opened == f"<{tags[0]}>":
        settings["params"] = {"opened": opened, **settings["params"]}
    return settings


def cautions(config: Config, inputs: Inputs) -> Iterator[str]:
    """Warnings about tags that reward functions or the data mention and that reward functions do not see."""
    tokenizer: Any = inputs.tokenizer
    ends = ends_of(tokenizer, inputs.eos_token_ids)
    special = {str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special and i not in ends}
    functions = {function.path: _text(function) for function in config.reward.functions}
    if config.reward.special_tokens == "drop":
        by_function = {tag for tag in special for text in functions.values() if tag in text}
        by_data = {tag for tag in special if TAG.fullmatch(tag) and tag in _data(inputs.train.prompts)}
        if mentioned := sorted(by_function | by_data):
            who = "reward functions mention" if by_function else "the data mentions"
            yield (
                f"{who} {', '.join(mentioned)}, special tokens of {config.model.path}, which the text that "
                "reward functions read does not have: set reward.special_tokens=keep"
            )
    opened = opened_tag(inputs.train.prompts, tokenizer)
    closing = opened.replace("<", "</").replace("[", "[/")
    told = {f.path for f in config.reward.functions if "opened" in with_opened(f, opened)["params"]}
    if concerned := [
        path for path, text in functions.items() if opened and (opened in text or closing in text)
    ]:
        others = [path for path in concerned if path not in told]
        yield (
            f"the prompts end with {opened}, so completions begin inside it and do not have this tag: "
            + "format_match counts it as written" * bool(told)
            + "; " * bool(told and others)
            + f"{', '.join(others)} must expect completions without it" * bool(others)
        )


def _text(function: RewardFunction) -> str:
    """Where a function may mention tags: its `params` and, for a file, the file."""
    pattern = function.params.get("pattern")
    is_list = function.path in FORMAT_MATCH and isinstance(pattern, list)
    tags = cast(list[str], pattern) if is_list else []
    file = Path(function.path.rpartition(":")[0])
    source = file.read_text(errors="replace") if file.suffix == ".py" and file.is_file() else ""
    return source + json.dumps(function.params, default=str) + "".join(f"<{tag}></{tag}>" for tag in tags)


def _data(prompts: Sequence[Prompt]) -> str:
    return "\n".join(f"{prompt.content} {prompt.columns}" for prompt in prompts[:EXAMINED])
