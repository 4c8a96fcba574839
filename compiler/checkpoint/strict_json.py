"""JSON from files nobody vouches for: no duplicate keys, no NaN, bounded size and depth, one error that says where."""
from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, NoReturn

from compiler.errors import CheckpointError, UserError

MAX_DEPTH = 32
MAX_DIGITS = 20  # 2**64 has as many; arithmetic on longer ones could itself be made slow
MAX_FILE_BYTES = 32 << 20
SHOWN_CHARACTERS = 120


def shown(value: Any) -> str:
    """A value as JSON would spell it, short and printable, for a message."""
    text = value if isinstance(value, str) else json.dumps(value, default=repr)
    text = repr(text) if isinstance(value, str) else text
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def file_bytes(path: Path) -> int:
    """Size of a regular file. Raises CheckpointError when it is missing, unreadable or something else."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a possible file name"
        raise CheckpointError(f"{path}: {reason}. Check that the checkpoint was copied whole.") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file. Put the file itself there.")
    return status.st_size


def exists(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have is not there."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def load_file(path: Path, error: type[UserError]) -> dict[str, Any]:
    """The JSON object in a file. Raises `error` for wrong content, CheckpointError for a missing or oversized file."""
    size = file_bytes(path)
    if size > MAX_FILE_BYTES:
        raise CheckpointError(f"{path} has {size} bytes, but JSON files here may have {MAX_FILE_BYTES} at most.")
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise CheckpointError(f"{path}: {problem.strerror}. Check that it may be read.") from None
    return loads(data, str(path), error)


def loads(data: bytes, where: str, error: type[UserError]) -> dict[str, Any]:
    """The JSON object in `data`. Raises `error`, whose message starts with `where`."""
    def refuse(what: str) -> NoReturn:
        raise error(f"{where}: {what}. The file is damaged or was edited by hand: fetch it again.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            refuse(f"the key {shown(_first_repeated(pairs))} stands twice")
        return found

    def integer(text: str) -> int:
        if len(text.lstrip("-")) > MAX_DIGITS:
            refuse(f"an integer has more than {MAX_DIGITS} digits")
        return int(text)

    def constant(name: str) -> NoReturn:
        refuse(f"{name} is not a JSON number")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_int=integer, parse_constant=constant)
    except UnicodeDecodeError:
        refuse("not UTF-8 text")
    except json.JSONDecodeError as problem:
        refuse(f"not JSON ({problem.msg} at character {problem.pos})")
    except RecursionError:
        refuse(f"nested deeper than {MAX_DEPTH} levels")
    if not isinstance(value, dict):
        refuse(f"a JSON object is needed, not {type(value).__name__}")
    if _too_deep(value):
        refuse(f"nested deeper than {MAX_DEPTH} levels")
    return value


def _first_repeated(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            return name
        seen.add(name)
    raise AssertionError("no repeated name")


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)
                 if isinstance(child, (dict, list))]
        if not level:
            return False
    return True
