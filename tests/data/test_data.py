"""Datasets of prompts: how prompts are tokenised, what is refused and how, and the order of prompts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.data.order import order
from rlhf.data.prompts import PromptDataset, load_prompts

CHAT = [{"role": "user", "content": "What is 3 + 5?"}]
ROWS = [{"prompt": CHAT, "answer": 8}, {"prompt": [{"role": "user", "content": "1 + 1?"}], "answer": 2}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_lines(*lines: object, name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        return path

    return write_lines


def load(path: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PromptDataset:
    return load_prompts(path, tokenizer, **{"max_prompt_tokens": 100, **settings})


def test_chat_messages_go_through_the_chat_template_and_open_the_assistants_turn(
    write: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    (prompt,) = load(write(ROWS[0]), tokenizer).prompts
    written = "<|im_start|>user\nWhat is 3 + 5?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(list(prompt.token_ids)) == written
    assert (prompt.id, prompt.content, prompt.columns) == ("train.jsonl:1", CHAT, {"answer": 8})


def test_parts_of_text_are_written_as_the_text_they_are(
    write: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "3 + 5?"}]
    in_parts = {**ROWS[0], "prompt": [{"role": "user", "content": parts}]}
    whole, cut = load(write(ROWS[0], in_parts), tokenizer).prompts
    assert cut.token_ids == whole.token_ids
    assert cut.content == [{"role": "user", "content": parts}]


def test_plain_text_is_used_as_it_is(write: Callable[..., Path], tokenizer: PreTrainedTokenizerBase) -> None:
    (prompt,) = load(write({"prompt": "3 + 5 ="}), tokenizer).prompts
    assert tokenizer.convert_ids_to_tokens(list(prompt.token_ids)) == list("3Ġ+Ġ5Ġ=")
    assert prompt.columns == {}


def test_text_and_chat_may_stand_in_one_file_and_keep_their_order(
    write: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    dataset = load(write({"prompt": "a"}, {"prompt": CHAT}, "", {"prompt": "b"}), tokenizer)
    assert [p.id for p in dataset.prompts] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:4"]
    assert [len(p.token_ids) for p in dataset.prompts] == [1, 33, 1]


def save_parquet(folder: Path) -> Path:
    Dataset.from_list(ROWS).to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


def save_gz(folder: Path) -> Path:
    with gzip.open(folder / "train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    return folder / "train.jsonl.gz"


def save_zst(folder: Path) -> Path:
    with pyarrow.CompressedOutputStream(str(folder / "train.jsonl.zst"), "zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    return folder / "train.jsonl.zst"


def save_parquet_folder(folder: Path) -> Path:
    for name, rows in (("a.parquet", ROWS[:1]), ("b.parquet", ROWS[1:])):
        Dataset.from_list(rows).to_parquet(folder / name)
    return folder


def save_datasets_folder(folder: Path) -> Path:
    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("save", [save_parquet, save_gz, save_zst, save_parquet_folder, save_datasets_folder])
def test_every_layout_gives_the_prompts_that_jsonl_gives(
    save: Callable[[Path], Path],
    tmp_path: Path,
    write: Callable[..., Path],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (tmp_path / "data").mkdir()
    dataset = load(save(tmp_path / "data"), tokenizer)
    expected = load(write(*ROWS), tokenizer)
    assert [(p.token_ids, p.content, p.columns) for p in dataset.prompts] == [
        (p.token_ids, p.content, p.columns) for p in expected.prompts
    ]
    assert dataset.columns == expected.columns == ("answer",)
    assert len({p.id for p in dataset.prompts}) == len(dataset) == 2


def test_another_column_may_hold_the_prompts(
    write: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    dataset = load(write({"question": "3?", "answer": 3}), tokenizer, prompt_column="question")
    assert dataset[0].content == "3?"
    assert dataset[0].columns == {"answer": 3}


GOOD = {"prompt": "1?", "answer": 1}
MALFORMED = {
    "bad JSON": (GOOD, '{"prompt": ', r"train.jsonl:2: not JSON \(Expecting value at column 1\d\)"),
    "no object": (GOOD, [1], r"train.jsonl:2: expected a JSON object, got list \[1\]"),
    "a typo": (
        GOOD,
        {"promt": "2?"},
        r"train.jsonl:2: no column 'prompt' among 'promt'; did you mean 'promt'\?",
    ),
    "wrong type": (GOOD, {"prompt": 7}, r"train.jsonl:2: column 'prompt' must be text .* got int 7"),
    "empty text": (GOOD, {"prompt": " \n"}, r"train.jsonl:2: column 'prompt' is empty"),
    "no messages": (GOOD, {"prompt": []}, r"train.jsonl:2: column 'prompt' is empty"),
    "no message": (GOOD, {"prompt": ["hi"]}, r"train.jsonl:2: .* message 0 is 'hi'"),
    "no role": (GOOD, {"prompt": [{"content": "hi"}]}, r"train.jsonl:2: .* 'role' .* message 0 has None"),
    "no text": (
        GOOD,
        {"prompt": [{"role": "user", "content": 3}]},
        r"train.jsonl:2: .* 'content' .* message 0 has 3",
    ),
    "an answered prompt": (
        GOOD,
        {"prompt": [*CHAT, {"role": "assistant", "content": "8"}]},
        r"train.jsonl:2: .* ends with a message of the assistant",
    ),
    "a lost column": (GOOD, {"prompt": "2?"}, r"train.jsonl:2: .* 'answer' differ"),
    "nothing": ("", "", r"train.jsonl holds no prompts"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_line_is_refused_with_file_line_and_reason(
    what: str, write: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    *lines, message = MALFORMED[what]
    path = write(*lines)
    with pytest.raises(ValueError, match=message):
        load(path, tokenizer)


def test_bytes_that_are_no_text_are_refused_with_their_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=r"train.jsonl:2: not UTF-8 text"):
        load(tmp_path / "train.jsonl", tokenizer)


def test_a_missing_dataset_names_its_neighbour(
    write: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(GOOD)
    with pytest.raises(ValueError, match=r"there is no dataset .*tran.jsonl .*did you mean .*train.jsonl\?"):
        load(path.parent / "tran.jsonl", tokenizer)


def test_another_kind_of_file_is_refused(
    write: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=r"expected a .jsonl, .* file .* got '.tsv'"):
        load(write("a,b", name="train.tsv"), tokenizer)


def test_a_file_that_only_calls_itself_parquet_is_refused(
    write: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=r"train.parquet: not a parquet file"):
        load(write("no parquet at all", name="train.parquet"), tokenizer)


def test_a_csv_file_has_its_columns_by_name_and_numbers_as_numbers(
    write: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    text = 'prompt,answer,why\n3 + 5,8,"a, and\nb"\nsay 1,1.5,\n'
    dataset = load(write(text, name="train.csv"), tokenizer)
    assert [p.content for p in dataset.prompts] == ["3 + 5", "say 1"]
    assert [dict(p.columns) for p in dataset.prompts] == [
        {"answer": 8.0, "why": "a, and\nb"},
        {"answer": 1.5, "why": ""},
    ]
    with pytest.raises(ValueError, match="not a csv file with a line of names"):
        load(write("a,b\n1\n", name="train.csv"), tokenizer)


def test_a_packed_file_that_is_damaged_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for save in (save_gz, save_zst):
        file = save(tmp_path)
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(ValueError, match=rf"{file.name}: cannot be unpacked"):
            load(file, tokenizer)


def test_an_empty_folder_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"folder without .jsonl, .*.csv files"):
        load(tmp_path, tokenizer)


def test_a_folder_of_splits_asks_for_one_of_them(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    splits = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])})
    splits.save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"several splits \(test, train\): name one"):
        load(tmp_path / "both", tokenizer)
    assert len(load(tmp_path / "both" / "train", tokenizer)) == 2


HUB: dict[Any, Dataset] = {"train": Dataset.from_list(ROWS[:1]), "test": Dataset.from_list(ROWS[1:])}


@pytest.mark.parametrize(
    ("given", "asked", "answers"),
    [
        ("owner/sums:test", ("owner/sums", None, "test"), [2]),
        ("owner/sums/hard:train", ("owner/sums", "hard", "train"), [8]),
    ],
)
def test_a_dataset_of_the_hub_is_named_with_its_split(
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    asked: tuple[str, str | None, str],
    answers: list[int],
) -> None:
    def hub(name: str, config: str | None, split: str | None) -> Any:
        assert (name, config, split) == asked
        return HUB[asked[2]]

    monkeypatch.setattr("datasets.load_dataset", hub)
    found = load(Path(given), tokenizer)
    assert [prompt.columns["answer"] for prompt in found.prompts] == answers
    assert found.prompts[0].id == f"{given.rpartition('/')[2]}:1"


def test_a_dataset_of_the_hub_without_a_split_names_those_it_has(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits: dict[str, Any] = {"owner/both": DatasetDict(HUB), "owner/one": DatasetDict({"test": HUB["test"]})}
    monkeypatch.setattr("datasets.load_dataset", lambda name, config, split: splits[name])
    with pytest.raises(
        ValueError, match=r"owner/both has the splits train, test: name one.*owner/both:train"
    ):
        load(Path("owner/both"), tokenizer)
    assert [p.columns["answer"] for p in load(Path("owner/one"), tokenizer).prompts] == [2]


def test_what_the_hub_does_not_have_is_said_with_both_places(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"no file or folder owner/none .*, and the hub gives no dataset"):
        load(Path("owner/none"), tokenizer)


def test_a_tokenizer_without_chat_template_is_refused(
    write: Callable[..., Path], tiny_model_dir: Path
) -> None:
    plain = AutoTokenizer.from_pretrained(tiny_model_dir)
    plain.chat_template = None
    with pytest.raises(ValueError, match=r"train.jsonl:1: .* has no chat template; use an instruct model"):
        load(write(*ROWS), plain)


def test_what_the_chat_template_refuses_is_refused_with_its_line(
    write: Callable[..., Path], tiny_model_dir: Path
) -> None:
    strict = AutoTokenizer.from_pretrained(tiny_model_dir)
    strict.chat_template = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(ValueError, match=r"train.jsonl:1: .* no system message, please"):
        load(write(*ROWS), strict)


def test_long_prompts_are_refused_and_the_first_is_named(
    write: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write({"prompt": "abc"}, {"prompt": "abcdef"}, {"prompt": "abcdefg"})
    with pytest.raises(ValueError, match=r"2 of 3 prompts .* = 3, the first is train.jsonl:2 with 6 tokens"):
        load(path, tokenizer, max_prompt_tokens=3)


def test_long_prompts_are_skipped_and_counted(
    write: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write({"prompt": "abc"}, {"prompt": "abcdef"}, {"prompt": "ab"})
    dataset = load(path, tokenizer, max_prompt_tokens=3, long_prompts="skip")
    assert ([p.id for p in dataset.prompts], dataset.skipped) == (["train.jsonl:1", "train.jsonl:3"], 1)


def test_skipping_every_prompt_is_refused(
    write: Callable[..., Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=r"1 of 1 prompts .* raise the limit$"):
        load(write({"prompt": "abcdef"}), tokenizer, max_prompt_tokens=3, long_prompts="skip")


sizes = st.integers(1, 40)
seeds = st.integers(0, 2**63)


@given(seed=seeds, num_prompts=sizes, epoch=st.integers(0, 5))
def test_every_epoch_sees_every_prompt_once(seed: int, num_prompts: int, epoch: int) -> None:
    assert sorted(order(seed, num_prompts, epoch * num_prompts, num_prompts)) == list(range(num_prompts))


@given(seed=seeds, num_prompts=sizes, position=st.integers(0, 200), counts=st.tuples(sizes, sizes))
def test_slices_of_the_order_concatenate(
    seed: int, num_prompts: int, position: int, counts: tuple[int, int]
) -> None:
    first = order(seed, num_prompts, position, counts[0])
    second = order(seed, num_prompts, position + counts[0], counts[1])
    assert order(seed, num_prompts, position, sum(counts)) == first + second


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    walks = [order(0, 50, 0, 50), order(0, 50, 50, 50), order(1, 50, 0, 50), list(range(50))]
    assert len({tuple(walk) for walk in walks}) == 4


def test_the_order_of_a_seed_never_changes() -> None:
    # a run that is resumed under another version of Python or NumPy relies on this
    assert order(0, 8, 6, 4) == [6, 4, 3, 7]
