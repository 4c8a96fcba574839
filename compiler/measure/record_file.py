"""The file that `--record` names: JSON lines, added at its end, each whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

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
        size = stream.tell()
        try:
            rest = memoryview(lines)
            while rest:  # one write, unless the disk is full in its middle
                rest = rest[stream.write(rest) :]
        except OSError as error:
            with suppress(OSError):  # of what is no regular file
                stream.truncate(size)
            raise UserError(f"{file}: cannot be written: {error.strerror}. Make room, or give another file.") from None
