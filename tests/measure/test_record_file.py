"""What --record writes: whole lines or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.errors import UserError
from compiler.measure import record_file
from tests.tune.test_records import files_end_at


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "new" / "r.jsonl"
    record_file.append(file, [{"a": 1}, {"a": 2}])
    before = file.read_bytes()
    assert before == b'{"a": 1}\n{"a": 2}\n'
    with files_end_at(len(before) + 5), pytest.raises(UserError) as caught:
        record_file.append(file, [{"a": 3}, {"a": 4}])
    assert str(caught.value) == f"{file}: cannot be written: File too large. Make room, or give another file."
    assert file.read_bytes() == before
    with pytest.raises(UserError) as caught:
        record_file.append(Path("/dev/full"), [{"a": 3}])
    said = "/dev/full: cannot be written: No space left on device. Make room, or give another file."
    assert str(caught.value) == said


def test_looking_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("x")
    for name in ("old", "new"):
        record_file.require_writable(tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "x")]
