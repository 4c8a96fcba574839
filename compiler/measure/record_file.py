"""JSON lines that are added at a file's end, each whole or not at all: what `--record` names, and tuning records."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from compiler.errors import UserError


def require_writable(file: Path) -> None:
    """Raise OSError, which names the file, before anything has been measured; leaves no empty file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    file.open("ab").close()
    if new:
        file.unlink()


def append(file: Path, records: Sequence[Mapping[str, object]]) -> None:
    """Add records. Raises UserError where there is no room, and leaves the file as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    with file.open("ab", buffering=0) as stream:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)  # what another process adds meanwhile is not cut off with ours
        try:
            add(stream, lines)
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error.strerror}. Make room, or give another file.") from None


def add(stream: IO[bytes], lines: bytes, sync: bool = False) -> None:
    """Write at the end of a file that was opened unbuffered to append, and wait for the disk if asked.

    Raises OSError where there is no room, and leaves the file as it was.
    """
    size = os.fstat(stream.fileno()).st_size
    try:
        rest = memoryview(lines)
        while rest:  # one write, unless the disk is full in its middle
            rest = rest[stream.write(rest) :]
        if sync:
            os.fsync(stream.fileno())
    except OSError:
        with suppress(OSError):  # of what is no regular file
            stream.truncate(size)
        raise
