"""Memory that is timed lies in pages as weights do."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

import pytest

from runtime import timing


def advice(area: mmap.mmap) -> set[str]:
    """What the kernel notes of the mapping (VmFlags of smaps)."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
        low, high = (int(place, 16) for place in block.split(None, 1)[0].split("-"))
        if low <= start < high:
            return set(block.partition("VmFlags:")[2].split())
    raise AssertionError("the mapping is not there")


@pytest.mark.parametrize(
    ("release", "flag"), [("6.16.0-rc1", "hg"), ("7.0", "hg"), ("6.15.9-generic", "nh"), ("5.4", "nh")]
)
def test_pages_by_kernel(release: str, flag: str) -> None:
    area = timing.memory(4 << 20, release)
    assert len(area) == 4 << 20 and flag in advice(area) and "sh" not in advice(area)


@pytest.mark.parametrize(
    ("text", "kib"), [("AnonHugePages:    512 kB\n", 2048), ("AnonHugePages:    511 kB\n", 4), ("Rss: 9 kB\n", None)]
)
def test_what_memory_came_in(text: str, kib: int | None, tmp_path: Path) -> None:
    (tmp_path / "smaps").write_text("7f00-7fff ---p 00000000 00:00 0 [rollup]\n" + text)
    assert timing.page_kib(1 << 20, tmp_path / "smaps") == kib
    assert timing.page_kib(1 << 20, tmp_path / "none") is None
