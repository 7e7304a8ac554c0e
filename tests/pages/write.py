"""Writes the pages that are made from code: `make docs`, or `python -m tests.pages.write`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def write() -> None:
    # read when transformers is imported: the pages are made without a network, as the tests compare them
    os.environ["HF_HUB_OFFLINE"] = "1"
    from tests.pages import errors, files, settings

    (DOCS / "architecture.md").write_text(files.render())
    (DOCS / "settings.md").write_text(settings.render())
    with tempfile.TemporaryDirectory() as folder:
        said = errors.Bench(Path(folder)).try_all()
    (DOCS / "errors.md").write_text(errors.render(said))
    sys.stdout.write("docs/architecture.md, docs/settings.md and docs/errors.md are written\n")


if __name__ == "__main__":
    write()
