"""The bundle folder: complete or absent. Files go to a hidden neighbour, the manifest last, then one rename."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from compiler.errors import UserError
from runtime import manifest
from runtime.manifest import CHUNK_BYTES, FileDigest

PARTIAL = ".partial-"


class BundleError(UserError):
    """The place for a bundle cannot be used."""


def check_place(out: Path) -> None:
    """Refuse early what `staged` would refuse after the work: a file, or a folder that is no bundle."""
    if out.is_dir() and (any(out.iterdir()) and not (out / manifest.FILE_NAME).is_file()):
        raise BundleError(f"{out}: is a folder with other things in it, not a bundle. Give --out a new name.")
    if out.exists() and not out.is_dir():
        raise BundleError(f"{out}: is a file; a bundle is a folder. Give --out another name.")
    if not out.parent.is_dir():
        raise BundleError(f"{out}: there is no folder {out.parent}. Create it first.")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A fresh folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    An older bundle at `out` is replaced. What a killed build left behind carries PARTIAL in its hidden name and no
    manifest; the next build to the same place removes it.
    """
    check_place(out)
    for stale in out.parent.glob(f".{out.name}{PARTIAL}*"):
        shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}{PARTIAL}", dir=out.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        if out.exists():
            old = scratch.with_name(f"{scratch.name}-old")
            out.rename(old)
            scratch.rename(out)
            shutil.rmtree(old)
        else:
            scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def digests(folder: Path, chunked: str) -> dict[str, FileDigest]:
    """Digest of every file in `folder`; the one named `chunked` by pieces, so that it can be checked in parallel."""
    files = sorted(path for path in folder.iterdir() if path.name != manifest.FILE_NAME)
    return {path.name: _digest_chunks(path) if path.name == chunked else manifest.digest_file(path) for path in files}


def _digest_chunks(path: Path) -> FileDigest:
    """As manifest.digest_file with CHUNK_BYTES, but in threads: hashlib lets go of the interpreter lock."""
    size = path.stat().st_size
    with path.open("rb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        handle = file.fileno()

        def digest(start: int) -> str:
            return hashlib.sha256(os.pread(handle, CHUNK_BYTES, start)).hexdigest()

        chunks = tuple(pool.map(digest, range(0, size, CHUNK_BYTES)))
    return FileDigest(size, manifest.digest_of_chunks(chunks), CHUNK_BYTES, chunks)
