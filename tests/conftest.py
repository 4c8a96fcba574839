"""What all tests share: the rule that CI skips nothing unseen, and the emulated board."""
from __future__ import annotations

import os
import re
from collections.abc import Generator
from typing import Any

import hypothesis
import pytest

from compiler.board import qemu

# In CI a skip is a failure, unless its reason matches one of these: what no package can bring to a machine.
ALLOWED_SKIPS = (
    r"this CPU lacks ",  # a kernel for an instruction set that the CI machine does not have
    r"no NVIDIA GPU",
    r"the peer \S+ is not installed",  # other engines, for comparisons: minutes of building, hundreds of megabytes
)
IN_CI = bool(os.environ.get("CI"))
# CI tries the same examples every time; a busy machine is no failure.
hypothesis.settings.register_profile("quern", deadline=None, derandomize=IN_CI)
hypothesis.settings.load_profile("quern")


def unwanted_skip(reason: str) -> bool:
    """True for a reason that CI does not accept."""
    text = reason.removeprefix("Skipped: ")
    return not any(re.match(allowed, text) for allowed in ALLOWED_SKIPS)


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if unwanted_skip(reason):
            report.outcome = "failed"
            report.longrepr = f"{reason}\nIn CI this skip is a failure: tests/conftest.py lists the accepted reasons."


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """A skipped test."""
    report = yield
    if IN_CI:
        _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    """A module that skips itself as a whole."""
    report = yield
    if IN_CI:
        _fail_if_skipped(report)
    return report


@pytest.fixture(scope="session")
def board() -> Any:
    """`compiler.board.qemu` with its root made: board.run(["-c", "print(1)"]) runs the board's Python."""
    if missing := qemu.missing_tools():
        pytest.skip(f"the emulated board needs {', '.join(missing)}: apt-get install qemu-user (on Debian or Ubuntu)")
    qemu.root()
    return qemu
