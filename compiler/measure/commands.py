"""Commands of ours in processes of their own, as a user starts them: with a limit, signs of life, and an end for sure.

What hangs may be a kernel on a GPU, in a process that such a command has started: the whole group goes, because whoever
holds the other end of a pipe would be waited for without end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

from compiler.errors import UserError

LOOK_S = 5.0  # between two looks at a command that runs


def run(
    module: str, *arguments: str, limit_s: float, look: Callable[[float], None], more: Mapping[str, str] | None = None
) -> str:
    """stdout of `python -m module arguments`; `look` is told every few seconds for how long it has been running.

    more: variables for its environment. Raises UserError with its last words, or with the limit that it exceeded.
    """
    command = [sys.executable, "-m", module, *arguments]
    shown, started = f"{module} {' '.join(arguments)}", time.monotonic()
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **(more or {})}, start_new_session=True,
    )  # fmt: skip
    try:
        while True:
            left = limit_s - (time.monotonic() - started)
            if left <= 0:
                raise UserError(f"{shown} was ended after {limit_s:.0f} s: it hangs, or the machine is too slow.")
            try:
                out, err = child.communicate(timeout=min(LOOK_S, left))
                break
            except subprocess.TimeoutExpired:
                look(time.monotonic() - started)
    finally:
        _end(child)
    if child.returncode:
        said = err.strip().removeprefix("error: ") or f"it said nothing and left with {child.returncode}"
        raise UserError(f"{shown} failed: {said}")
    return out


def _end(child: subprocess.Popen[str]) -> None:
    """The command and all that it started, unless it has ended: then nobody holds its pipes either."""
    if child.returncode is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            stream.close()
