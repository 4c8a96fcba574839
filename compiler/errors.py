"""What a user can get wrong. The command line prints the message without a traceback and leaves with `exit_code`.

A message says where, what was found, what is needed and what to do. `assert` is for our own bugs, never for input.
"""
from __future__ import annotations

from runtime.errors import printable


class UserError(Exception):
    """A mistake in the user's input or request, not in quern. Control characters in the message come out escaped."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class CheckpointError(UserError):
    """A checkpoint file or folder is missing, damaged or inconsistent."""


class ConfigError(UserError):
    """config.json (or a file merged into it) lacks a key, contradicts itself or has a value that cannot be."""


class FormatError(UserError):
    """Quantised tensors disagree with what their quantisation format says they must be."""


class UnsupportedError(UserError):
    """The input is sound, but quern cannot handle it (yet)."""
