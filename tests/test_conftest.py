"""The rule that CI skips nothing unseen, tried on a small project of its own."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
TESTS = """
import pytest

def test_passes(): pass
def test_of_a_tool(): pytest.skip("no such tool")
def test_of_a_cpu(): pytest.skip("this CPU lacks amx_int8")
@pytest.mark.skipif(True, reason="not today")
def test_marked(): pass
@pytest.mark.xfail(reason="known")
def test_known(): raise ValueError
"""


def outcome(folder: Path, ci: str, tests: str = TESTS) -> tuple[int, str]:
    """Exit status and last line of pytest on these tests, under our conftest.py."""
    (folder / "test_it.py").write_text(tests)
    (folder / "conftest.py").write_text("from tests.conftest import *\n")
    options = ["-p", "no:cacheprovider", "-q", "-rs", "-c", os.devnull, "--rootdir=."]
    command = [sys.executable, "-m", "pytest", *options, "."]
    environment = os.environ | {"CI": ci, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_at_home_skips_are_only_shown(tmp_path: Path) -> None:
    status, said = outcome(tmp_path, ci="")
    assert status == 0
    assert "1 passed, 3 skipped, 1 xfailed" in said
    assert "no such tool" in said


def test_in_ci_they_fail_unless_allowed(tmp_path: Path) -> None:
    status, said = outcome(tmp_path, ci="true")
    assert status == 1
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed, 1 error" in said  # skipif fails in the set-up: an error
    assert "In CI this skip is a failure" in said


@pytest.mark.parametrize(("ci", "expected"), [("", 5), ("true", 2)])  # 5: nothing collected, 2: collection failed
def test_a_module_that_skips_itself(tmp_path: Path, ci: str, expected: int) -> None:
    status, said = outcome(tmp_path, ci, "import pytest\npytest.importorskip('no_such_module')\ndef test_x(): pass\n")
    assert status == expected
    assert ("In CI this skip is a failure" in said) == bool(ci)
