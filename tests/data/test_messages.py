"""Prompts, messages and tools: every row of docs/data.md, and what tokenizers and templates do with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]
import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]
import pytest
from datasets import Dataset
from tokenizers import processors
from transformers import AutoTokenizer

from rlhf.data.prompts import PromptDataset, load_prompts
from rlhf.models.chat import ChatError, write_chat
from tests.rewards.test_model import save_classifier

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
# as the page describes it; the calls stand for the content, and only a key that is there is a call
TEMPLATE = (
    "{% if tools %}[tools] {{ tools | map(attribute='function.name') | join(', ') }} {% endif %}"
    "{% for m in messages %}[{{ m.role }}] {% if 'tool_calls' in m %}"
    "{% for c in m.tool_calls %}[call] {{ c.function.name }} {% endfor %}{% else %}"
    "{% if 'name' in m %}({{ m.name }}) {% endif %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
USER = {"role": "user", "content": "add 2 and 3"}
ROWS = [
    {"prompt": [{"role": "user", "content": "what is 2 + 3?"}]},
    {"prompt": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "name": "add", "content": "5"}]},
]  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return tokenizer_of(tmp_path)


def tokenizer_of(folder: Path, *, template: Any = TEMPLATE, single: str = "$A") -> Any:
    """A token for each byte; `single` says which special tokens (<s>, </s>) are put around a text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({t: i for i, t in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = template
    made.save_pretrained(folder / "tokenizer")
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def load(folder: Path, tokenizer: Any, *rows: Any) -> PromptDataset:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(folder / "train.jsonl", tokenizer, max_prompt_tokens=500)


def texts(tokenizer: Any, prompts: PromptDataset) -> list[str]:
    return [tokenizer.decode(list(p.token_ids)) for p in prompts.prompts]


def rows_of_the_page() -> Iterator[tuple[str, str, str]]:
    """Column, JSON of its value, and what is given or said, of each row of the page's tables."""
    column = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if head := re.match(r"\| the column `(\w+)`", line):
            column = head[1]
        elif row := re.fullmatch(r"\| `(.+)` \| (.+) \|", line):
            yield column, row[1], row[2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("column", "value", "result"), list(rows_of_the_page()))
def test_each_row_of_the_page_is_as_it_says(
    column: str, value: str, result: str, tmp_path: Path, tokenizer: Any
) -> None:
    line = f'{{"prompt": [{{"role": "user", "content": "hi"}}], "{column}": {value}}}\n'
    path = tmp_path / "train.jsonl"
    path.write_text(line)
    if result.startswith("refused: "):
        with pytest.raises(ValueError, match=re.escape(result.removeprefix("refused: "))) as refusal:
            load_prompts(path, tokenizer, max_prompt_tokens=500)
        assert str(refusal.value).startswith(f"{path}:1: ")
    else:
        written = texts(tokenizer, load_prompts(path, tokenizer, max_prompt_tokens=500))
        assert [f"`{text.rstrip()}`" for text in written] == [result]


def test_the_page_has_its_three_tables() -> None:
    assert len(list(rows_of_the_page())) == 19 + 3 + 6


def test_rows_give_the_same_prompts_from_every_kind_of_file(tmp_path: Path, tokenizer: Any) -> None:
    # Arrow gives both messages the keys tool_calls and name, null in those that have none
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "train.parquet")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    expected = load(tmp_path, tokenizer, *ROWS)
    assert texts(tokenizer, expected) == [
        "[user] what is 2 + 3? [assistant]",
        "[user] add 2 and 3 [assistant] [call] add [tool] (add) 5 [assistant]",
    ]
    for path in (tmp_path / "train.parquet", tmp_path / "saved"):
        found = load_prompts(path, tokenizer, max_prompt_tokens=500)
        assert [(p.token_ids, p.content) for p in found.prompts] == [
            (p.token_ids, p.content) for p in expected.prompts
        ]


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>"])
def test_text_that_a_template_wrote_gets_no_second_beginning(tmp_path: Path, single: str) -> None:
    tokenizer = tokenizer_of(tmp_path, template="<s>" + TEMPLATE, single=single)
    chat = [{"role": "user", "content": "hi"}]
    written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompts = load(tmp_path, tokenizer, {"prompt": written}, {"prompt": chat}, {"prompt": "hi"})
    wanted = "<s>[user] hi [assistant]"
    assert texts(tokenizer, prompts) == [wanted, wanted, "<s>hi"]


def test_an_end_that_the_tokenizer_appends_does_not_end_a_prompt(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, single="$A </s>")
    assert texts(tokenizer, load(tmp_path, tokenizer, {"prompt": "say a"})) == ["say a"]
    # an end that the user wrote stays
    assert texts(tokenizer, load(tmp_path, tokenizer, {"prompt": "say a</s>"})) == ["say a</s>"]


def test_a_reward_model_reads_one_beginning_and_one_end(tmp_path: Path) -> None:
    from rlhf.models.scored_text import AtEnd
    from rlhf.rewards.model import RewardModel

    model = RewardModel(str(save_classifier(tmp_path, ["reward"])))
    model.tokenizer = tokenizer_of(tmp_path, template="<s>" + TEMPLATE, single="<s> $A </s>")
    decode = model.tokenizer.decode

    def read(prompt: Any, completion: Any) -> str:
        return decode(model._tokens(prompt, completion))  # pyright: ignore[reportPrivateUsage]

    assert read("why?", "so") == read("<s>why?", "so") == "<s>why?so</s>"
    answer = [{"role": "assistant", "content": "so", "tool_calls": None}]
    assert read([{"role": "user", "content": "why?", "tool_calls": None}], answer) == (
        "<s>[user] why? [assistant] so "
    )
    model.max_tokens = 5
    assert read("why?", "so") == "<s>?so</s>"
    # one that this project trained ends with the end of the completion, and has none after the prompt
    model.form, model.max_tokens = AtEnd(), 99
    rows = [model._row(prompt, "so", "", ()) for prompt in ("why?", "<s>why?")]  # pyright: ignore[reportPrivateUsage]
    assert [decode(row.ids) for row in rows] == ["<s>why?so</s>"] * 2


@pytest.mark.parametrize(
    "content",
    [
        "{{ m['content'] + ' ' }}",
        "{% if m['content'] is none %}[call] "
        "{{ m.tool_calls[0].function.name }} {% else %}{{ m['content'] }} {% endif %}",
    ],
)
def test_calls_are_written_or_the_prompt_is_refused(content: str, tmp_path: Path) -> None:
    template = f"{{% for m in messages %}}[{{{{ m.role }}}}] {content}{{% endfor %}}"
    tokenizer = tokenizer_of(tmp_path, template=template)
    prompt = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    row = {"prompt": [*prompt, {"role": "tool", "content": "5"}]}
    if "is none" in content:
        # this template, as DeepSeek's, knows calls by a content that is null
        (text,) = texts(tokenizer, load(tmp_path, tokenizer, row))
        assert text == "[user] add 2 and 3 [assistant] [call] add [tool] 5 "
    else:
        with pytest.raises(ValueError, match=r"train.jsonl:1: the chat template does not write tool_calls"):
            load(tmp_path, tokenizer, row)


def test_tools_that_a_template_leaves_out_are_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, template="{% for m in messages %}{{ m.content }}{% endfor %}")
    row = {"prompt": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}
    with pytest.raises(ValueError, match=r"train.jsonl:1: the chat template does not write tools"):
        load(tmp_path, tokenizer, row)
    # beside plain text the column is for rewards
    (prompt,) = load(tmp_path, tokenizer, {**row, "prompt": "hi"}).prompts
    assert prompt.columns == {"tools": row["tools"]}


def test_of_named_templates_the_default_is_taken_and_that_for_tools_with_tools(tmp_path: Path) -> None:
    named = {"default": "plain{{ messages[0].content }}", "tool_use": "tools {{ tools }}"}
    tokenizer = tokenizer_of(tmp_path, template=named)
    assert write_chat(tokenizer, [USER]) == "plainadd 2 and 3"
    assert write_chat(tokenizer, [USER], tools=[{"name": "f"}]) == "tools [{'name': 'f'}]"
    as_list = [{"name": "default", "template": "a list"}]
    assert write_chat(tokenizer, [USER], template=as_list) == "a list"
    tokenizer.chat_template = {"rag": "x"}
    with pytest.raises(ChatError, match=r"has the chat templates rag, and none of them is named 'default'"):
        write_chat(tokenizer, [USER])


def test_an_error_within_a_template_names_the_line(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, template="{{ messages[0].content + 1 }}")
    with pytest.raises(ValueError, match=r"train.jsonl:1: the tokenizer's chat template refuses .*str"):
        load(tmp_path, tokenizer, ROWS[0])


def test_half_a_character_is_replaced_in_every_column_and_reported(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(
        '{"prompt": "a \\ud83d\\ude00", "x": "ok"}\n{"prompt": "b", "x": ["\\uD83D", {"y": "\\ude00"}]}\n'
    )
    first, second = load_prompts(path, tokenizer, max_prompt_tokens=99).prompts
    # a whole pair is a character, and stays
    assert first.content == "a \U0001f600"
    assert second.columns == {"x": ["\ufffd", {"y": "\ufffd"}]}
    assert [record.message for record in caplog.records] == [
        f"{path}:2: half of a character (a lone surrogate, \\udXXX) becomes U+FFFD"
    ]


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
def test_a_pointer_of_git_lfs_in_place_of_data_is_named(name: str, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2\n")
    with pytest.raises(ValueError, match=rf"{name} is a pointer of Git LFS, not the data: fetch it with"):
        load_prompts(tmp_path / name, tokenizer, max_prompt_tokens=99)


def test_a_damaged_parquet_file_is_named(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "a" * 500}]), file, compression="gzip")
    contents = bytearray(file.read_bytes())
    contents[20:60] = b"\xff" * 40
    file.write_bytes(contents)
    with pytest.raises(ValueError, match=r"train.parquet: the parquet file is damaged|not a parquet file"):
        load_prompts(file, tokenizer, max_prompt_tokens=999)
