"""The bundle folder: complete or absent. Files go to a hidden neighbour, the manifest last, then one rename."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from compiler.errors import UserError
from runtime import manifest
from runtime.manifest import FileDigest
from runtime.manifest_check import ARCHES
from targets import Target

PARTIAL, OLD = ".partial-", ".old"
MIB = 1 << 20
PATIENCE_S = 5.0  # to get rid of a folder in which somebody still writes


class BundleError(UserError):
    """The place for a bundle cannot be used."""


def check_place(out: Path) -> None:
    """Refuse early what `staged` would refuse after the work: a file, a folder with foreign things in it, no parent."""
    place = out.resolve()
    try:
        str(place).encode()
    except UnicodeEncodeError:
        raise BundleError(f"{out}: this name is not UTF-8, and TVM writes to no other. Give --out another.") from None
    if place.is_dir() and (foreign := _foreign(place)):
        raise BundleError(
            f"{out}: is a folder with {foreign[0]!r} in it, which is no part of a bundle and would be lost: a build "
            f"replaces the whole folder. Give --out a new name."
        )
    if place.exists() and not place.is_dir():
        raise BundleError(f"{out}: is a file; a bundle is a folder. Give --out another name.")
    if not place.parent.is_dir():
        raise BundleError(f"{out}: there is no folder {place.parent}. Create it first.")
    if not os.access(place.parent, os.W_OK):
        raise BundleError(f"{out}: the folder {place.parent} cannot be written to. Give --out another place.")
    _refuse_second(out)


def check_target(target: Target) -> None:
    """Refuse a target that no bundle can run on."""
    if target.arch not in ARCHES:
        raise BundleError(
            f"--target {target.name}: quern has kernels for it, but TVM has no runtime for {target.arch} yet, so no "
            f"bundle would run there; bundles are for {' and '.join(ARCHES)}. `bench --shape NAME --target "
            f"{target.name} --cost model` counts what its kernels execute."
        )


@contextmanager
def staged(out: Path, room_bytes: int = 0) -> Iterator[Path]:
    """A fresh folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    An older bundle at `out` is replaced. What a killed build left behind carries PARTIAL in its hidden name; the next
    build to the same place removes it. A folder that is being written is locked, so that a second build is refused.
    room_bytes: what will be written, at least: a disk without that is refused.
    """
    check_place(out)
    place = out.resolve()
    _clean(place)
    _check_room(out, room_bytes)
    scratch, lock = place.parent / f".{place.name}{PARTIAL}{secrets.token_hex(8)}", None
    try:
        scratch.mkdir(0o700)  # named before it is made: an interrupt at any moment leaves nothing
        lock = os.open(scratch, os.O_RDONLY)  # the kernel lets go of it when this process ends, however it does
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        scratch.chmod(0o755)
        yield scratch
        _replace(scratch, place)
    except OSError as error:
        if error.filename is not None:
            raise
        raise BundleError(f"{out}: cannot be written: {error.strerror}. Make room, or choose another place.") from error
    finally:
        _remove(scratch)
        if lock is not None:
            os.close(lock)


def _refuse_second(out: Path) -> None:
    """Raise BundleError while another process is writing a bundle to the same place."""
    place = out.resolve()
    for folder in place.parent.glob(f".{glob.escape(place.name)}{PARTIAL}*"):
        with suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BundleError(
                    f"{out}: another build is writing it at this moment. Wait for its end, or give --out another name."
                ) from None
            finally:
                os.close(handle)


def _check_room(out: Path, room_bytes: int) -> None:
    """Refuse a disk that is too small: LLVM ends the process when it cannot write, and packing may take minutes."""
    free = shutil.disk_usage(out.resolve().parent).free
    if free < room_bytes:
        raise BundleError(
            f"{out}: takes {room_bytes / MIB:.0f} MiB to write, but its disk has {free / MIB:.0f} MiB left. Make room, "
            f"or choose another place."
        )


def digests(folder: Path, known: Mapping[str, FileDigest]) -> dict[str, FileDigest]:
    """Digest of every file in `folder`, in the order of names; those of `known` were found while they were written."""
    files = sorted(path for path in folder.iterdir() if path.name != manifest.FILE_NAME)
    return {path.name: known.get(path.name) or manifest.digest_file(path) for path in files}


def _foreign(folder: Path) -> list[str]:
    """Names in `folder` that no version of quern put there. Other tools have a manifest.json, too."""
    try:
        found = json.loads((folder / manifest.FILE_NAME).read_bytes())
        ours = {manifest.FILE_NAME, *found["files"]} if found["format"] == manifest.FORMAT else set()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        ours = set()
    return sorted(path.name for path in folder.iterdir() if path.name not in ours)


def _clean(place: Path) -> None:
    """Remove what a killed build left; an older bundle that it had moved away already comes back."""
    for stale in sorted(place.parent.glob(f".{glob.escape(place.name)}{PARTIAL}*")):
        if stale.name.endswith(OLD) and not place.exists():
            stale.rename(place)
        else:
            _remove(stale)


def _remove(folder: Path) -> None:
    """Delete a folder, in which the linker of an interrupted build may go on writing for a moment."""
    deadline = time.monotonic() + PATIENCE_S
    shutil.rmtree(folder, ignore_errors=True)
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
        shutil.rmtree(folder, ignore_errors=True)


def _replace(made: Path, place: Path) -> None:
    """`made` becomes `place`. The older bundle goes last, and comes back when `made` cannot take its place."""
    old = made.with_name(made.name + OLD)
    try:
        if place.exists():
            place.rename(old)
        made.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)
