"""What a user can get wrong. Messages say where, what it is, what is needed and what to do; the CLI exits with 2."""

from __future__ import annotations

import errno

# What printing may meet: a reader that is gone, a full disk.
UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class UserError(Exception):
    """Base of all errors that are printed as one message, without a traceback."""


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
