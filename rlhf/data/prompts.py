"""Reads datasets of prompts (jsonl, parquet, `datasets` folders, reasoning-gym), checks and tokenises them.

All lines are checked before weights are loaded. The order in which prompts are visited is not stored here: it
is a function of seed and position (`rlhf/data/order.py`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf.models.vision.images import ImageError, has_pictures, of_text
from rlhf.models.vision.processor import Processor
from rlhf.rewards import gym
from rlhf.types import Messages, Prompt

SUFFIXES = (".jsonl", ".parquet")
TOKENIZE_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a dataset.

    Example: `Row("train.jsonl:7", "data/train.jsonl:7", {"prompt": "What is 3 + 5?", "answer": 8})`.
    """

    id: str
    where: str
    """The place as error messages name it: the whole path and the line, counted from 1."""
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PromptDataset:
    """The tokenised prompts of a dataset, without those that are longer than the limit.

    Example: of 64 lines 2 are too long and skipped, so the length is 62:
    `PromptDataset((Prompt(...), ...), ("answer",), skipped=2, source=Path("train.jsonl"))`.
    """

    prompts: tuple[Prompt, ...]
    columns: tuple[str, ...]
    """Columns of every line other than prompt and images; reward functions may ask for them."""
    skipped: int
    """Number of prompts left out because they are longer than the limit."""
    source: Path

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def load_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_column: str = "prompt",
    image_column: str | None = None,
    max_prompt_tokens: int,
    long_prompts: Literal["refuse", "skip"] = "refuse",
    processor: Processor | None = None,
    change: Callable[[Row], Row] = lambda row: row,
) -> PromptDataset:
    """Reads, checks and tokenises every prompt.

    A prompt is plain text, tokenised as it is, or a list of chat messages. Chat messages are written by the
    tokenizer's chat template, up to the opening of the assistant's turn. For a vision-language model its
    `processor` (rlhf/models/vision/processor.py) writes messages with images, including the images of
    `image_column`. `change` is applied to a line before it is checked.

    Raises ValueError, with file and line, when the path does not exist or is not a dataset, when a line is
    not a JSON object, when the prompt column is missing (the message names the most similar column), when a
    prompt is empty or neither text nor chat messages, and when a line has other columns than the first line;
    also for chat messages if the tokenizer has no chat template, for images that cannot be read or that the
    model cannot process, and for prompts longer than `max_prompt_tokens` unless `long_prompts` is "skip".
    """
    path, prompts, too_long, columns = Path(path), list[Prompt](), list[Prompt](), tuple[str, ...]()
    for rows, found in tokenized(path, tokenizer, prompt_column, image_column, processor, change):
        columns = columns or _others(rows[0], prompt_column, image_column)
        for prompt in found:
            (too_long if len(prompt.token_ids) > max_prompt_tokens else prompts).append(prompt)
    if too_long and (long_prompts == "refuse" or not prompts):
        raise ValueError(
            f"{path}: {len(too_long)} of {len(prompts) + len(too_long)} prompts are longer than "
            f"max_prompt_tokens = {max_prompt_tokens}, the first is {too_long[0].id} with "
            f"{len(too_long[0].token_ids)} tokens; raise the limit"
            + (", or set long_prompts to skip" if prompts else "")
        )
    return PromptDataset(tuple(prompts), columns, skipped=len(too_long), source=path)


def tokenized(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt_column: str,
    image_column: str | None,
    processor: Processor | None,
    change: Callable[[Row], Row] = lambda row: row,
) -> Iterator[tuple[list[Row], list[Prompt]]]:
    """Yields checked lines and their prompts, many at a time; `change` is applied to a line before it is
    checked. Raises ValueError as `load_prompts` does."""
    tokenize = partial(_tokenize, tokenizer=tokenizer)
    if processor is not None:
        folder = path.parent if path.is_file() else path
        tokenize = partial(_tokenize_with_images, tokenizer=tokenizer, processor=processor, folder=folder)
    rows = _checked_rows(path, prompt_column, change)
    while some := list(islice(rows, TOKENIZE_AT_ONCE)):
        yield some, list(tokenize(some, prompt_column=prompt_column, image_column=image_column))


def _tokenize(
    rows: Sequence[Row],
    *,
    tokenizer: PreTrainedTokenizerBase,
    prompt_column: str,
    image_column: str | None,
) -> Iterator[Prompt]:
    contents: list[Messages] = [row.columns[prompt_column] for row in rows]
    for row, content in zip(rows, contents, strict=True):
        if _column_images(row, image_column) is not None or has_pictures(content):
            raise ValueError(
                f"{row.where}: the prompt has images, but the model has no image processor; use a "
                "vision-language model, or set data.image_column to null if that column holds the images"
            )
    ids: list[list[int]] = [[]] * len(rows)
    chats = [i for i, content in enumerate(contents) if not isinstance(content, str)]
    texts = [i for i, content in enumerate(contents) if isinstance(content, str)]
    if chats:
        # a chat template writes the special tokens itself
        written = [_write_chat(rows[i], contents[i], tokenizer) for i in chats]
        _encode(tokenizer, chats, written, ids, add_special_tokens=False)
    if texts:
        _encode(tokenizer, texts, [cast(str, contents[i]) for i in texts], ids, add_special_tokens=True)
    for row, content, token_ids in zip(rows, contents, ids, strict=True):
        if not token_ids:
            raise ValueError(f"{row.where}: the tokenizer makes no token of the prompt {content!r}")
        others = {name: row.columns[name] for name in _others(row, prompt_column, image_column)}
        yield Prompt(row.id, tuple(token_ids), content, others)


def _tokenize_with_images(
    rows: Sequence[Row],
    *,
    tokenizer: PreTrainedTokenizerBase,
    processor: Processor,
    folder: Path,
    prompt_column: str,
    image_column: str | None,
) -> Iterator[Prompt]:
    """Tokenises rows one by one; every image is read, so that broken ones are found before weights load."""
    for row in rows:
        content: Messages = row.columns[prompt_column]
        column_images = _column_images(row, image_column)
        others = {name: row.columns[name] for name in _others(row, prompt_column, image_column)}
        if isinstance(content, str):
            if column_images is not None:
                raise ValueError(f"{row.where}: a prompt with images must be chat messages, got text")
            ids = cast(list[int], cast(Any, tokenizer)(content)["input_ids"])
            yield Prompt(row.id, tuple(ids), content, others)
            continue
        try:
            written, images, ids = processor.prompt(row.id, content, column_images, folder)
        except ImageError as error:
            raise ValueError(f"{row.where}: {error}") from None
        yield Prompt(row.id, tuple(ids), written, others, images or None)


def _column_images(row: Row, image_column: str | None) -> object | None:
    """The images in the image column of a row, None if there are none."""
    value: object = None if image_column is None else row.columns.get(image_column)
    return None if value == [] else value


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    places: Sequence[int],
    texts: list[str],
    ids: list[list[int]],
    *,
    add_special_tokens: bool,
) -> None:
    """Writes the token ids of `texts` to the given places of `ids`."""
    encoded = cast(Any, tokenizer)(texts, add_special_tokens=add_special_tokens)["input_ids"]
    for place, token_ids in zip(places, encoded, strict=True):
        ids[place] = token_ids


def _write_chat(row: Row, messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    if not cast(Any, tokenizer).chat_template:
        raise ValueError(
            f"{row.where}: the prompt is a list of chat messages, but the tokenizer of "
            f"{cast(Any, tokenizer).name_or_path!r} has no chat template; use an instruct model, "
            "or give prompts as plain text"
        )
    try:
        written = of_text(cast(Any, messages))
        return cast(Any, tokenizer).apply_chat_template(written, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"{row.where}: the tokenizer's chat template refuses the prompt: {error}") from None


def _checked_rows(
    path: Path, prompt_column: str, change: Callable[[Row], Row] = lambda row: row
) -> Iterator[Row]:
    """The rows of a dataset; raises ValueError at the first one that is malformed."""
    first: Row | None = None
    for row in map(change, _read(path)):
        if prompt_column not in row.columns:
            near = difflib.get_close_matches(prompt_column, row.columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{row.where}: no column {prompt_column!r} among {quoted(row.columns)}{hint} "
                "(data.prompt_column says which one holds the prompt)"
            )
        problem = _problem_of(row.columns[prompt_column])
        if problem:
            raise ValueError(f"{row.where}: column {prompt_column!r} {problem}")
        first = first or row
        if row.columns.keys() != first.columns.keys():
            differing = sorted(row.columns.keys() ^ first.columns.keys())
            raise ValueError(
                f"{row.where}: has the columns {quoted(row.columns)}, but {first.where} has "
                f"{quoted(first.columns)}; every line needs the same ones, {quoted(differing)} differ"
            )
        yield row
    if first is None:
        raise ValueError(f"{path} holds no prompts: it has no lines")


def _problem_of(content: object) -> str | None:
    """What is wrong with a prompt, as the rest of a sentence about its column; None if nothing is."""
    if isinstance(content, str):
        return None if content.strip() else "is empty"
    if not isinstance(content, list):
        return f"must be text or a list of chat messages, got {type(content).__name__} {content!r:.80}"
    messages = cast(list[object], content)
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            return f"must be a list of chat messages, but message {number} is {message!r:.80}"
        fields = cast(Mapping[str, object], message)
        if isinstance(fields.get("content"), list) and isinstance(fields.get("role"), str):
            problem = _problem_of_parts(cast(list[object], fields["content"]))
            if problem:
                return f"has in message {number} {problem}"
            continue
        for key in ("role", "content"):
            if not isinstance(fields.get(key), str):
                found = f"{fields.get(key)!r:.80}"
                return f"needs text under {key!r} in each message, but message {number} has {found}"
    if not messages or not any(_is_not_empty(cast(Any, message)["content"]) for message in messages):
        return "is empty"
    if cast(Any, messages[-1])["role"] == "assistant":
        return "ends with a message of the assistant, but the policy must write that message: remove it"
    return None


def _problem_of_parts(parts: list[object]) -> str | None:
    """What is wrong with the content of a message that is a list of texts and images; None if nothing is."""
    for part in parts:
        fields = cast(Mapping[str, object], part if isinstance(part, Mapping) else {})
        if fields.get("type") == "image":
            continue
        if fields.get("type") == "text" and isinstance(fields.get("text"), str):
            continue
        return (
            f"a part {part!r:.80}, which is neither {{'type': 'text', 'text': ...}} nor "
            "{'type': 'image', 'image': ...}"
        )
    return None


def _is_not_empty(content: object) -> bool:
    return bool(content.strip() if isinstance(content, str) else content)


def first_row(path: str | Path) -> Row:
    """A dataset's first line. Raises ValueError: it cannot be read, or has no lines."""
    row = next(_read(Path(path).expanduser()), None)
    if row is None:
        raise ValueError(f"{path} holds no prompts: it has no lines")
    return row


def _read(path: Path) -> Iterator[Row]:
    if str(path).startswith(gym.PREFIX):
        return (Row(name, f"{path}, entry {name}", columns) for name, columns in gym.rows(str(path)))
    if path.is_file():
        return _read_file(path)
    if not path.is_dir():
        near = difflib.get_close_matches(path.name, _entries(path.parent), n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        if not near and not path.suffix:
            hint = (
                "; to use a dataset of the hub, save it by datasets.load_dataset(NAME, split=...)"
                ".save_to_disk(FOLDER) and give FOLDER"
            )
        raise ValueError(f"there is no dataset {path} (looked from {Path.cwd()}){hint}")
    if (path / "dataset_dict.json").is_file():
        splits = [name for name in _entries(path) if (path / name).is_dir()]
        example = f", for example {path / splits[0]}" if splits else ", but none is there"
        raise ValueError(f"{path} holds several splits ({', '.join(splits)}): name one{example}")
    if (path / "state.json").is_file():
        return _read_saved_dataset(path)
    files = [path / name for name in _entries(path) if name.endswith(SUFFIXES)]
    if not files:
        raise ValueError(
            f"{path} is a folder without .jsonl or .parquet files, and not a saved `datasets` folder"
        )
    return (row for file in files for row in _read_file(file))


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    hint = "; write one JSON object per line and name the file .jsonl" if path.suffix == ".json" else ""
    raise ValueError(
        f"{path}: expected a .jsonl or .parquet file or a `datasets` folder, got {path.suffix!r}{hint}"
    )


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                value: object = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
            if not isinstance(value, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__} {value!r:.80}")
            yield Row(f"{path.name}:{number}", where, cast(dict[str, Any], value))


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as parquet  # pyright: ignore[reportMissingTypeStubs]

    try:
        file = cast(Any, parquet).ParquetFile(path)
    except ValueError as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from None
    with file:
        batches: Iterator[Any] = file.iter_batches(batch_size=TOKENIZE_AT_ONCE)
        yield from _number(path, (values for batch in batches for values in batch.to_pylist()))


def _read_saved_dataset(path: Path) -> Iterator[Row]:
    from datasets import Dataset  # pyright: ignore[reportMissingTypeStubs]

    return _number(path, cast(Any, Dataset).load_from_disk(str(path)))


def _number(path: Path, lines: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for number, columns in enumerate(lines, start=1):
        yield Row(f"{path.name}:{number}", f"{path}:{number}", columns)


def _others(row: Row, *taken: str | None) -> tuple[str, ...]:
    return tuple(name for name in row.columns if name not in taken)


def _entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def quoted(columns: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in columns) or "none at all"
