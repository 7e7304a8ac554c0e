"""Pairs as files: whatever kills the maker, and however often, the same bytes are there at the end."""

from __future__ import annotations

import json
import os
import signal
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rlhf.pairs.files import SAME, Made, Pair, PairsError, Summary, write_pairs

SETTINGS = {"maker": "test", "seed": 3}
ITEMS = 5


def picture(shade: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (2, 2), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def make(number: int) -> Made:
    """Item 2 gives no pair, item 3 two; items 0 and 4 have the same picture."""
    if number == 2:
        return Made(dropped={"nobody knows": 2})
    content = [{"type": "image"}, {"type": "text", "text": f"é {number}?"}]
    prompt = [{"role": "user", "content": content}]
    pair = Pair(prompt, "yes", f"no {number}", (picture(number % 4),), {"number": number})
    same = Pair("as text", "yes", "yes")
    return Made((pair, Pair("as text", "a", "b")) if number == 3 else (pair, same), counts={"tries": number})


def written(folder: Path, maker: Any = make) -> Summary:
    return write_pairs(folder, SETTINGS, ITEMS, maker, label="making")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "new" / "whole"
    written(folder)
    return folder


def test_lines_pictures_and_counts(whole: Path):
    lines = [json.loads(line) for line in (whole / "pairs.jsonl").read_text().splitlines()]
    # one pair each of items 0, 1 and 4, two of item 3
    assert [line.get("number") for line in lines] == [0, 1, 3, None, 4]
    assert lines[3] == {"prompt": "as text", "chosen": "a", "rejected": "b"}
    [message] = lines[4]["prompt"]
    image, text = message["content"]
    assert (whole / image["image"]).read_bytes() == picture(0) and text == {"type": "text", "text": "é 4?"}
    assert len(list((whole / "pictures").iterdir())) == 3
    summary = json.loads((whole / "summary.json").read_text())
    # tries: 0 + 1 + 3 + 4; items 0, 1 and 4 have a pair of the same completion twice
    assert summary == {
        "settings": SETTINGS,
        "items": 5,
        "pairs": 5,
        "dropped": {SAME: 3, "nobody knows": 2},
        "counts": {"tries": 8},
    }
    assert not (whole / "pairs.part").exists()


def test_a_maker_that_is_killed_twice_writes_the_same_bytes(whole: Path, tmp_path: Path):
    for at in (1, 3):

        def dies(number: int, at: int = at) -> Made:
            if number == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return make(number)

        child = os.fork()
        if not child:
            written(tmp_path, dies)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        # a line that was being written, in the middle of a character
        with (tmp_path / "pairs.part").open("ab") as part:
            part.write('{"pairs": [{"prompt": "é'.encode()[:-1])
    # a picture that a crash of the machine has emptied: item 1 is made again
    next((tmp_path / "pictures").glob(f"{_digest(picture(1))}.png")).write_bytes(b"")
    asked: list[int] = []
    written(tmp_path, lambda number: asked.append(number) or make(number))
    assert asked == [1, 2, 3, 4]
    assert contents(tmp_path) == contents(whole)


def _digest(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()[:20]


def test_finished_pairs_are_not_made_again(whole: Path):
    before = contents(whole)
    assert written(whole, pytest.fail).pairs == 5
    assert contents(whole) == before


def test_other_settings_other_files_and_other_processes_are_refused(whole: Path, tmp_path: Path):
    with pytest.raises(PairsError, match=r"other settings \(seed: 3 -> 4\); name another folder"):
        write_pairs(whole, SETTINGS | {"seed": 4}, ITEMS, make, label="making")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PairsError, match="holds other files"):
        written(tmp_path)
    with pytest.raises(PairsError, match="is a file"):
        written(tmp_path / "notes.txt")
    with pytest.raises(PairsError, match="in use by another process"):
        written(tmp_path / "own", lambda number: written(tmp_path / "own") and make(number))


def test_what_cannot_be_written_and_what_gave_nothing_is_told(tmp_path: Path):
    with pytest.raises(PairsError, match="cannot be written as JSON"):
        written(tmp_path / "a", lambda _: Made((Pair("x", "a", "b", columns={"raw": b"x"}),)))
    nothing = written(tmp_path / "b", lambda _: Made(dropped={"nobody knows": 1}))
    with pytest.raises(PairsError, match="no pair was made of 5 items"):
        list(nothing.lines(tmp_path / "b"))
