"""Reads datasets of prompts (jsonl, parquet, `datasets` folders, reasoning-gym), checks and tokenises them.

All lines are checked before weights are loaded. The order in which prompts are visited is not stored here: it
is a function of seed and position (`rlhf/data/order.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Row, quoted, read_rows
from rlhf.models.chat import ChatError, encode_texts, messages_of, of_text, tools_of, write_chat
from rlhf.models.vision.images import ImageError, has_pictures
from rlhf.models.vision.processor import Processor
from rlhf.types import Messages, Prompt

TOKENIZE_AT_ONCE = 1024
TOOLS = "tools"
"""The column whose tools (JSON schemas) the chat template writes into a prompt of chat messages."""


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
    tokenizer's chat template, with the tools of the column `tools`, up to the opening of the assistant's
    turn. For a vision-language model its `processor` (rlhf/models/vision/processor.py) writes messages with
    images, including the images of `image_column`. `change` is applied to a line before it is checked.
    docs/data.md has every form that is accepted.

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
        written = [_write_chat(rows[i], contents[i], tokenizer) for i in chats]
        # a chat template writes the special tokens itself
        encoded = cast(Any, tokenizer)(written, add_special_tokens=False)["input_ids"]
        ids = _placed(ids, chats, encoded)
    if texts:
        ids = _placed(ids, texts, encode_texts(tokenizer, [cast(str, contents[i]) for i in texts]))
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
            (ids,) = encode_texts(tokenizer, [content])
            yield Prompt(row.id, tuple(ids), content, others)
            continue
        try:
            written, images, ids = processor.prompt(row.id, content, column_images, folder, tools=_tools(row))
        except (ChatError, ImageError) as error:
            raise ValueError(f"{row.where}: {error}") from None
        yield Prompt(row.id, tuple(ids), written, others, images or None)


def _column_images(row: Row, image_column: str | None) -> object | None:
    """The images in the image column of a row, None if there are none."""
    value: object = None if image_column is None else row.columns.get(image_column)
    return None if value == [] else value


def _placed(ids: Sequence[list[int]], places: Sequence[int], encoded: Sequence[list[int]]) -> list[list[int]]:
    """`ids` with the entries at `places` replaced."""
    found = dict(zip(places, encoded, strict=True))
    return [found.get(place, own) for place, own in enumerate(ids)]


def _write_chat(row: Row, messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return write_chat(tokenizer, of_text(cast(Any, messages)), tools=_tools(row))
    except ChatError as error:
        raise ValueError(f"{row.where}: {error}") from None


def _tools(row: Row) -> list[dict[str, Any]] | None:
    """The tools of a prompt of chat messages."""
    try:
        return tools_of(row.columns.get(TOOLS))
    except ChatError as error:
        raise ValueError(f"{row.where}: column {TOOLS!r} {error}") from None


def _checked_rows(
    path: Path, prompt_column: str, change: Callable[[Row], Row] = lambda row: row
) -> Iterator[Row]:
    """The rows of a dataset, their prompts as `messages_of` gives them.

    Raises ValueError at the first one that is malformed.
    """
    first: Row | None = None
    for row in map(change, read_rows(path)):
        if prompt_column not in row.columns:
            near = difflib.get_close_matches(prompt_column, row.columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{row.where}: no column {prompt_column!r} among {quoted(row.columns)}{hint} "
                "(data.prompt_column says which one holds the prompt)"
            )
        try:
            content = messages_of(row.columns[prompt_column])
        except ChatError as error:
            raise ValueError(f"{row.where}: column {prompt_column!r} {error}") from None
        first = first or row
        if row.columns.keys() != first.columns.keys():
            differing = sorted(row.columns.keys() ^ first.columns.keys())
            raise ValueError(
                f"{row.where}: has the columns {quoted(row.columns)}, but {first.where} has "
                f"{quoted(first.columns)}; every line needs the same ones, {quoted(differing)} differ"
            )
        yield replace(row, columns={**row.columns, prompt_column: content})
    if first is None:
        raise ValueError(f"{path} holds no prompts: it has no lines")


def first_row(path: str | Path) -> Row:
    """A dataset's first line. Raises ValueError: it cannot be read, or has no lines."""
    row = next(read_rows(Path(path).expanduser()), None)
    if row is None:
        raise ValueError(f"{path} holds no prompts: it has no lines")
    return row


def _others(row: Row, *taken: str | None) -> tuple[str, ...]:
    return tuple(name for name in row.columns if name not in taken)
