"""Writes pairs: a JSON line a pair, in the form of docs/preferences.md, and pictures as files beside it.

FOLDER/pairs.jsonl    the pairs, written when all of them are made
FOLDER/pictures/      their pictures, each named by its contents
FOLDER/summary.json   the settings, how many pairs there are, and how many were dropped and why
FOLDER/pairs.part     what is made so far, a line an item; removed at the end

The work is cut into numbered items, and what comes of an item is a function of the settings and its number.
So a process that was killed goes on after the last item that pairs.part holds, and writes the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, cast

from PIL import Image as pil
from rich.console import Console
from rich.progress import track

from rlhf.files import sync, write_atomically
from rlhf.models.vision.images import open_picture
from rlhf.types import Image, Messages

SAME = "chosen and rejected are the same"


class PairsError(ValueError):
    """Pairs cannot be made or written. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with a better and a worse completion."""

    prompt: Messages
    """Text, or chat messages with `{"type": "image"}` where an image stands."""
    chosen: str
    rejected: str
    images: tuple[Image, ...] = ()
    """In the order of their places in the prompt."""
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further columns of the line."""


@dataclass(frozen=True, slots=True)
class Made:
    """What came of an item: `Made((pair,), dropped={"no answer is right": 2}, counts={"tries": 3})`."""

    pairs: tuple[Pair, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])
    """How many pairs were given up, by the reason."""
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    """Whatever else is counted, by its name; summed over the items."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What came of all items."""

    settings: Mapping[str, Any]
    items: int
    pairs: int
    dropped: Mapping[str, int]
    counts: Mapping[str, int]

    def lines(self, folder: Path) -> Iterator[str]:
        """Lines for the user. Raises PairsError, after them, where there is no pair to learn from."""
        yield f"items        {self.items}"
        yield f"pairs        {self.pairs}"
        yield from (f"dropped      {count}: {reason}" for reason, count in self.dropped.items())
        yield from (f"counted      {count}: {name}" for name, count in self.counts.items())
        yield f"written      {folder / 'pairs.jsonl'}"
        if not self.pairs:
            raise PairsError(f"no pair was made of {self.items} items; the lines above say why")


def write_pairs(
    folder: Path, settings: Mapping[str, Any], items: int, make: Callable[[int], Made], *, label: str
) -> Summary:
    """Makes the pairs of items `0 .. items-1` and writes them, with a progress bar on stderr.

    `settings`: all that the pairs depend on, as values of JSON; a folder with pairs of the same settings is
    gone on with, or left as it is when they are complete. `make` must depend on them and the item alone.
    A pair whose two completions are the same is dropped. `label`: what the progress bar says.

    Raises PairsError: the folder cannot be written, is in use, or holds something else; and whatever `make`
    raises.
    """
    with _locked(folder):
        files = _Files(folder, json.loads(json.dumps(settings)))
        if (finished := files.finished()) is not None:
            return finished
        with _writing(folder):
            done = files.resume()
        console, rest = Console(stderr=True), range(len(done), items)
        for number in track(rest, label, items, len(done), console=console, transient=True):
            made = make(number)
            with _writing(folder):
                done.append(files.add(made))
        with _writing(folder):
            return files.finish(done)


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of a folder of pairs."""

    folder: Path
    settings: Mapping[str, Any]

    @property
    def part(self) -> Path:
        return self.folder / "pairs.part"

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.jsonl"

    @property
    def summary(self) -> Path:
        return self.folder / "summary.json"

    def finished(self) -> Summary | None:
        """The summary of a folder whose pairs are complete, else None. Raises PairsError: it is of others."""
        if self.part.exists():
            return None
        if not self.summary.exists():
            if any(entry.name not in (".lock", "pictures") for entry in self.folder.iterdir()):
                raise PairsError(
                    f"--out: {self.folder} holds other files; name a folder that is new or empty"
                )
            return None
        try:
            summary = Summary(**json.loads(self.summary.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise PairsError(f"{self.summary} is damaged ({error}); remove {self.folder}") from None
        self._check(summary.settings)
        if not self.pairs.is_file():
            raise PairsError(f"{self.pairs} is missing; remove {self.folder} to make the pairs again")
        return summary

    def resume(self) -> list[dict[str, Any]]:
        """The lines of pairs.part that are whole and have all their pictures; the others are cut off.

        Raises PairsError: they were made with other settings.
        """
        entries = _whole_lines(self.part) if self.part.is_file() else []
        if entries:
            self._check(entries[0])
        there = {path.stem for path in (self.folder / "pictures").glob("*") if _is_whole(path)}
        kept: list[dict[str, Any]] = []
        for entry in entries[1:]:
            if not there.issuperset(entry["pictures"]):
                break
            kept.append(entry)
        write_atomically(self.part, "".join(map(_json, (self.settings, *kept))))
        return kept

    def add(self, made: Made) -> dict[str, Any]:
        """Writes the pictures of an item and its line of pairs.part; returns the line."""
        dropped, lines, names = Counter(made.dropped), list[dict[str, Any]](), list[str]()
        for pair in made.pairs:
            if pair.chosen == pair.rejected:
                dropped[SAME] += 1
                continue
            pictures = [self._picture(image) for image in pair.images]
            names += [path.stem for path in pictures]
            places = [f"{path.parent.name}/{path.name}" for path in pictures]
            answers = {"chosen": pair.chosen, "rejected": pair.rejected}
            lines.append({"prompt": _placed(pair.prompt, places), **answers, **pair.columns})
        entry = {"pairs": lines, "pictures": names, "dropped": dict(dropped), "counts": dict(made.counts)}
        with self.part.open("a", encoding="utf-8") as part:
            part.write(_json(entry))
        return entry

    def finish(self, done: Sequence[Mapping[str, Any]]) -> Summary:
        """Writes pairs and summary, and removes what was kept to go on from."""
        lines = [line for entry in done for line in entry["pairs"]]
        summary = Summary(
            self.settings, len(done), len(lines), _total(done, "dropped"), _total(done, "counts")
        )
        for picture in (self.folder / "pictures").glob("*"):
            sync(picture)
        write_atomically(self.pairs, "".join(map(_json, lines)))
        write_atomically(self.summary, json.dumps(asdict(summary), indent=1, ensure_ascii=False) + "\n")
        self.part.unlink()
        return summary

    def _check(self, before: Mapping[str, Any]) -> None:
        changed = [key for key in {**before, **self.settings} if before.get(key) != self.settings.get(key)]
        if changed:
            was = ", ".join(f"{key}: {before.get(key)!r} -> {self.settings.get(key)!r}" for key in changed)
            raise PairsError(
                f"--out: {self.folder} holds pairs that were made with other settings ({was}); name another "
                "folder, or remove it"
            )

    def _picture(self, image: Image) -> Path:
        # reads all of it: a picture that is missing or damaged is refused here
        open_picture(image)
        content = Path(image).read_bytes() if isinstance(image, str) else image
        with pil.open(BytesIO(content)) as picture:
            suffix = (picture.format or "png").lower()
        path = self.folder / "pictures" / f"{_name(content)}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_bytes(content)
            os.replace(temporary, path)
        return path


def _json(line: Mapping[str, Any]) -> str:
    try:
        return json.dumps(line, ensure_ascii=False) + "\n"
    except TypeError as error:
        raise PairsError(f"a pair cannot be written as JSON ({error}): {line!r:.200}") from None


def _placed(prompt: Messages, places: Sequence[str]) -> Messages:
    """The prompt with the files of its images where they stand; it must have as many places as files."""
    waiting = iter(places)

    def part(given: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"type": "image", "image": next(waiting)} if given["type"] == "image" else given

    if not isinstance(prompt, str):
        prompt = [
            m if isinstance(m["content"], str) else {**m, "content": [part(p) for p in m["content"]]}
            for m in prompt
        ]
    assert next(waiting, None) is None, "more images than places"
    return prompt


def _whole_lines(part: Path) -> list[dict[str, Any]]:
    """The lines of a file up to the first that a kill or a crash has cut or damaged."""
    found: list[dict[str, Any]] = []
    for line in part.read_bytes().split(b"\n")[:-1]:
        try:
            entry: object = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        found.append(cast(dict[str, Any], entry))
    return found


def _total(entries: Sequence[Mapping[str, Any]], name: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for entry in entries:
        total.update(entry[name])
    return dict(sorted(total.items()))


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _is_whole(picture: Path) -> bool:
    """Whether a file has the contents that it is named by; one that has not is removed."""
    whole = _name(picture.read_bytes()) == picture.stem
    if not whole:
        picture.unlink()
    return whole


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Keeps other processes from the folder. The system ends the lock with the process, however it ends."""
    if folder.exists() and not folder.is_dir():
        raise PairsError(f"--out: {folder} is a file; name a folder, new or of the same command")
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with _writing(folder):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _writing(folder: Path) -> Generator[None]:
    """Makes errors of the system into PairsError."""
    try:
        yield
    except BlockingIOError:
        raise PairsError(f"--out: {folder} is in use by another process; wait for it or end it") from None
    except OSError as error:
        raise PairsError(f"--out: {folder} cannot be written: {error}") from error
