"""What a user can get wrong. Messages say where, what it is, what is needed and what to do; the CLI exits with 2."""

from __future__ import annotations

import errno

# What printing may meet: a reader that is gone, a full disk.
UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def printable(text: str) -> str:
    """Names from a hostile file may stand in a message: none may move the cursor of a terminal. Line ends stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class UserError(Exception):
    """Base of all errors that are printed as one message, without a traceback; control characters come out escaped."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ManifestError(UserError):
    """manifest.json is not what this runtime can read."""


class BundleError(UserError):
    """The bundle directory is incomplete or damaged."""


class DeviceError(UserError):
    """The bundle was built for another machine: architecture, CPU features, glibc or memory."""


class LibraryError(UserError):
    """The TVM runtime libraries are missing, unloadable or of another version."""


class VmError(UserError):
    """TVM refused or failed inside a call: the bundle's code and its manifest disagree."""


class ContextFullError(UserError):
    """More tokens than the model's context holds."""


class InputError(UserError):
    """A prompt, an id, an option or an input file that cannot be used."""
