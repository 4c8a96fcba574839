"""The two command lines, run as a user runs them, and what a refused command must look like."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.end_to_end.places import REPO

Done = subprocess.CompletedProcess[str]
OF_THIS_PROCESS = ("TVM_NUM_THREADS", "TVM_BIND_THREADS")  # set by the sessions that run in the test process


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The caller's environment, with the repository to import from."""
    inherited = {name: value for name, value in os.environ.items() if name not in OF_THIS_PROCESS}
    return {**inherited, "PYTHONPATH": str(REPO), **(changes or {})}


def command(module: str, *arguments: object) -> list[str]:
    """python -m MODULE ARGUMENTS."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def run(module: str, *arguments: object, cwd: Path = REPO, env: Mapping[str, str] | None = None) -> Done:
    """The same, run to its end."""
    return subprocess.run(
        command(module, *arguments),
        cwd=cwd,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def message(code: int, out: str, err: str) -> str:
    """The one message of a command that must have been refused, and must have said nothing else."""
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("error: ").removesuffix("\n")


def listing(folder: Path) -> dict[str, bytes]:
    """Every path below `folder` with its content (b"" for a folder): what a refused command leaves as it was."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}
