"""What both command lines share: their parser, their standard streams, and how they end."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from typing import Any, NoReturn

from .errors import printable


class Parser(argparse.ArgumentParser):
    """argparse's, which would print all options first: ten lines that push the message out of sight.

    A mistake in the options is one message, as every other mistake is.
    """

    def error(self, message: str) -> NoReturn:
        """Exit code 2, as for a UserError."""
        self.exit(2, f"error: {message}. For what there is: {self.prog} --help\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """What nobody knows is told by the verb that was asked for, whose help is what one wants then."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            getattr(found, "verb_parser", self).error(f"unrecognized arguments: {' '.join(rest)}")
        return found


def port(text: str, least: int = 0) -> int:
    """An option's value that must be a port; 0, to listen on, is any that is free."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and least <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: {least} to 65535")
    return int(text)


def clean_up_on_sigterm() -> None:
    """From now on `kill` cleans up as Ctrl-C does, and the exit code is a shell's: 143."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def settle_streams() -> None:
    """A standard stream that is closed, as in `>&-`, is /dev/null, and what a terminal cannot show comes out as "?"."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # Else a file that is opened later gets its number, and with it what libraries print there.
            number = os.open(os.devnull, os.O_RDWR)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape" if name == "stdin" else "replace")


def refuse(message: str) -> int:
    """Print the one message of a mistake, if there is anywhere to print; gives the exit code."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"error: {printable(message)}\n")
    discard_output()
    return 2


def discard_output() -> None:
    """What could not be written goes nowhere: the interpreter would try once more when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # noqa: PERF203 of two
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
