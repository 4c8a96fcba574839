"""What both command lines share: their parser, and how they end when they are told to."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any, NoReturn


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


def clean_up_on_sigterm() -> None:
    """From now on `kill` cleans up as Ctrl-C does, and the exit code is a shell's: 143."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
