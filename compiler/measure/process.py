"""A process that measures: started once, asked by JSON lines, stopped while another one is asked.

Stopped, because some engines' threads spin when they have nothing to do, and slow what is measured beside them.
A request is one line on its stdin, the answer one line on its stdout. What it prints to stderr is shown when it dies.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compiler.errors import UserError

REPO = Path(__file__).parents[2]  # where `compiler` and `runtime` lie, for the process to import
START = "; ".join(
    [
        # PR_SET_PDEATHSIG, SIGKILL: one that is stopped would not see that whoever asked has been killed.
        "import ctypes, runpy, sys; ctypes.CDLL(None).prctl(1, 9)",
        # Last in the path: where quern is installed, other packages lie beside it that must not hide the environment's.
        f"sys.path.append({str(REPO)!r})",
        "runpy.run_module(sys.argv.pop(1), None, '__main__', True)",
    ]
)
LAST_LINES = 12  # of stderr that a message shows
END_SECONDS = 20


def command(python: Path | str, module: str, arguments: Sequence[str]) -> list[str]:
    """`python -m module arguments...` for a Python that may not have quern in its environment."""
    return [str(python), "-c", START, module, *arguments]


class Process:
    """`python -m module arguments...` in whichever environment `python` belongs to. Use it as a context manager."""

    def __init__(self, python: Path | str, module: str, arguments: Sequence[str]) -> None:
        self._name = module.rpartition(".")[2]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 closed by close()
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        self._child = subprocess.Popen(
            command(python, module, arguments),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env=variables, text=True,
        )  # fmt: skip

    def ask(self, verb: str, **details: Any) -> dict[str, Any]:
        """The answer; UserError with the process's own message when it refuses, or with its last words when it dies."""
        assert self._child.stdin is not None and self._child.stdout is not None
        line = ""
        self._child.send_signal(signal.SIGCONT)
        try:
            self._child.stdin.write(json.dumps({"verb": verb, **details}) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            raise UserError(self._last_words())
        self._child.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(str(answer["error"]))
        return answer

    def _last_words(self) -> str:
        code = self._child.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
        return "\n".join([f"The measured process {self._name} ended with status {code}.", *lines])

    def close(self) -> None:
        """End of its stdin is what it waits for; then it is gone."""
        self._child.send_signal(signal.SIGCONT)
        if self._child.stdin is not None:
            self._child.stdin.close()
        try:
            self._child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
        self._stderr.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Timed:
    """What asks a process that has the verbs prefill and decode, both of which give seconds. Speeds are tokens/s."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def prefill(self, tokens: int) -> float:
        """A prompt of `tokens` from an empty context to the logits after it."""
        return tokens / float(self.process.ask("prefill", tokens=tokens)["seconds"])

    def decode(self, context: int, tokens: int) -> float:
        """`tokens` tokens one by one, after `context` others."""
        return tokens / float(self.process.ask("decode", context=context, tokens=tokens)["seconds"])


def serve(measured: Callable[[], object]) -> int:
    """The other end: answer with the methods of what `measured` makes, until stdin ends. A UserError is an answer."""
    made: object = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            made = made or measured()
            answer = getattr(made, request.pop("verb"))(**request)
        except UserError as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0
