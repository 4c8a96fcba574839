"""The table of driver entry points: nothing newer than JetPack 4, and a mock that has these and no others."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from compiler.codegen import cuda
from tests.mock import cuda as mock

JETPACK_4 = 10020  # CUDA 10.2
HEADER = (Path(cuda.__file__).parent / "driver.h").read_text()
ENTRIES = re.findall(r"^  (REQUIRED|OPTIONAL)\((cu\w+), (\d+),", HEADER, re.MULTILINE)
GRAPHS = {name for kind, name, _ in ENTRIES if kind == "OPTIONAL"}


def test_nothing_is_newer_than_jetpack_4() -> None:
    assert len(ENTRIES) > 30
    assert not [name for _, name, since in ENTRIES if int(since) > JETPACK_4]
    assert {name for name in GRAPHS if "Graph" in name or "Capture" in name} == GRAPHS


def test_the_mock_has_what_the_table_lists() -> None:
    names = {name for _, name, _ in ENTRIES}
    whole, old = (ctypes.CDLL(str(mock.library(graphs))) for graphs in (True, False))
    assert set(re.findall(r"^CUresult (cu\w+)\(", mock.SOURCE.read_text(), re.MULTILINE)) == names
    assert all(hasattr(whole, name) for name in names)
    assert {name for name in names if not hasattr(old, name)} == GRAPHS
