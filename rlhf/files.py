"""Atomic file writes: a temporary file is written, synced to the disk and renamed. Pointers of Git LFS."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SAVED = ".saved"
"""A file of a run with the name of its newest checkpoint: that there was one is known even where the folder
of checkpoints is missing."""
LFS = b"version https://git-lfs"
"""How the small file begins that Git LFS leaves where it has not fetched a large one."""


def sync(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot wait for the disk: their files are then as safe as they make them
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replaces the contents of a file by `text`: after a crash the file holds the old text or the new one.

    Raises OSError when it cannot be written; the old file is then unchanged.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def follow_umask(path: Path) -> None:
    """Gives a file the permissions of new files: safetensors makes files for their owner alone."""
    status = Path("/proc/self/status").read_text()
    umask = next((int(line.split()[1], 8) for line in status.splitlines() if line.startswith("Umask")), 0o077)
    path.chmod(0o666 & ~umask)


def printable(text: str) -> str:
    """A text for a terminal: control characters, which could change all that is shown, become U+FFFD."""
    return _CONTROLS.sub("\ufffd", text)


def drop_unwritten(stream: Any) -> None:
    """Where a stream cannot be written any more, drops what it still holds: at its end, the interpreter would
    fail on it and change the exit status.
    """
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)


def is_pointer(file: Path) -> bool:
    """Whether a file is a pointer of Git LFS in place of its contents."""
    with file.open("rb") as stream:
        return stream.read(len(LFS)) == LFS
