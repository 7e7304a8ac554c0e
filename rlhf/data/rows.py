"""Reads the lines of a dataset: jsonl (also packed), parquet, csv, a `datasets` folder, a dataset of the hub,
or a task of reasoning-gym.
"""

from __future__ import annotations

import difflib
import gzip
import io
import json
import logging
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rlhf.files import is_pointer
from rlhf.rewards import gym

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*LINES, ".parquet", ".csv")
READ_AT_ONCE = 1024
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[^/:]+))?")
"""`OWNER/NAME`, `OWNER/NAME:SPLIT` or `OWNER/NAME/CONFIG:SPLIT`."""
_SURROGATE = re.compile("[\ud800-\udfff]")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a dataset.

    Example: `Row("train.jsonl:7", "data/train.jsonl:7", {"prompt": "What is 3 + 5?", "answer": 8})`.
    """

    id: str
    where: str
    """The place as error messages name it: the whole path and the line, counted from 1."""
    columns: Mapping[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """The lines of a dataset, in order.

    Raises ValueError, with file and line: there is no dataset, or a line cannot be read.
    """
    if str(path).startswith(gym.PREFIX):
        return (Row(name, f"{path}, entry {name}", columns) for name, columns in gym.rows(str(path)))
    if path.is_file():
        return _read_file(path)
    if not path.is_dir():
        near = difflib.get_close_matches(path.name, _entries(path.parent), n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        name = None if near or Path(path.parts[0]).exists() else _HUB_NAME.fullmatch(str(path))
        if name is not None:
            return _read_hub(name["name"], name["config"], name["split"])
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
            f"{path} is a folder without {', '.join(SUFFIXES)} files, and not a saved `datasets` folder"
        )
    return (row for file in files for row in _read_file(file))


def _read_hub(name: str, config: str | None, split: str | None) -> Iterator[Row]:
    """A dataset of the Hugging Face hub, or what `datasets` has of it in its cache.

    Raises ValueError: it cannot be had, or has several splits and none is named.
    """
    import datasets  # pyright: ignore[reportMissingTypeStubs]

    where = f"{name}/{config}" if config else name
    try:
        found: Any = cast(Any, datasets).load_dataset(name, config, split=split)
    # whatever network, hub and library raise
    except Exception as error:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"there is no file or folder {where} (looked from {Path.cwd()}), and the hub gives no dataset of "
            f"this name: {said:.200}"
        ) from None
    if split is None:
        splits = list(found)
        if len(splits) > 1:
            raise ValueError(
                f"{where} has the splits {', '.join(splits)}: name one, for example {where}:{splits[0]}"
            )
        split = splits[0]
        found = found[split]
    return _number(Path(f"{where}:{split}"), found)


def _read_file(path: Path) -> Iterator[Row]:
    check_no_pointer(path)
    if path.name.endswith(LINES):
        return _read_jsonl(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix == ".csv":
        return _read_csv(path)
    hint = "; write one JSON object per line and name the file .jsonl" if path.suffix == ".json" else ""
    raise ValueError(
        f"{path}: expected a {', '.join(SUFFIXES)} file or a `datasets` folder, got {path.suffix!r}{hint}"
    )


def _lines(path: Path) -> Generator[bytes]:
    """The lines of a file, unpacked. Raises ValueError: what is packed is damaged."""
    with _opened(path) as lines:
        try:
            yield from lines
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}: cannot be unpacked ({error})") from None


def _opened(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow  # pyright: ignore[reportMissingTypeStubs]

        return io.BufferedReader(cast(Any, pyarrow).CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def _read_jsonl(path: Path) -> Iterator[Row]:
    replaced = 0
    with closing(_lines(path)) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                value: object = json.loads(line.rstrip())
                if b"\\ud" in line.lower() and (whole := without_surrogates(value)) != value:
                    replaced += 1
                    if replaced == 1:
                        log.warning(
                            "%s: half of a character (a lone surrogate, \\udXXX) becomes U+FFFD", where
                        )
                    value = whole
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
            except RecursionError:
                raise ValueError(f"{where}: nested too deeply") from None
            except ValueError as error:
                # a number of thousands of digits
                raise ValueError(f"{where}: {error}") from None
            if not isinstance(value, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__} {value!r:.80}")
            yield Row(f"{path.name}:{number}", where, cast(dict[str, Any], value))


def _read_csv(path: Path) -> Iterator[Row]:
    """Lines are numbered as rows, the names of the columns left out; numbers are read as numbers."""
    from pyarrow import csv  # pyright: ignore[reportMissingTypeStubs]

    typed: Any = csv
    try:
        table = typed.read_csv(path, parse_options=typed.ParseOptions(newlines_in_values=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a csv file with a line of names ({error})") from None
    return _number(path, table.to_pylist())


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as parquet  # pyright: ignore[reportMissingTypeStubs]

    try:
        file = cast(Any, parquet).ParquetFile(path)
    except ValueError as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from None
    with file:
        yield from _number(path, _parquet_values(path, file))


def _parquet_values(path: Path, file: Any) -> Iterator[Mapping[str, Any]]:
    batches = iter(file.iter_batches(batch_size=READ_AT_ONCE))
    while True:
        try:
            batch = next(batches, None)
            values = None if batch is None else batch.to_pylist()
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: the parquet file is damaged ({error})") from None
        if values is None:
            return
        yield from values


def _read_saved_dataset(path: Path) -> Iterator[Row]:
    from datasets import Dataset  # pyright: ignore[reportMissingTypeStubs]

    return _number(path, cast(Any, Dataset).load_from_disk(str(path)))


def _number(path: Path, lines: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for number, columns in enumerate(lines, start=1):
        yield Row(f"{path.name}:{number}", f"{path}:{number}", columns)


def without_surrogates(value: Any) -> Any:
    """The value with each lone surrogate in its texts replaced by U+FFFD, as decoders of UTF-8 do.

    JSON can hold such halves of characters; no tokenizer and no file can.
    """
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [without_surrogates(entry) for entry in cast(list[Any], value)]
    if isinstance(value, dict):
        entries = cast(dict[str, Any], value)
        return {without_surrogates(key): without_surrogates(entry) for key, entry in entries.items()}
    return value


def check_no_pointer(file: Path) -> None:
    """Raises ValueError where a file is a pointer of Git LFS in place of the data."""
    if is_pointer(file):
        raise ValueError(f"{file} is a pointer of Git LFS, not the data: fetch it with git lfs pull")


def _entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def quoted(columns: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in columns) or "none at all"
