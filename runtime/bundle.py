"""Open a bundle directory: read its manifest, refuse the wrong machine, check every digest, map the weights.

No code of the bundle runs here. The weights are mapped read-only and handed out as views, so that a model takes its
memory once, in the page cache, and other processes share it.
"""

from __future__ import annotations

import hashlib
import mmap
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from . import device, manifest
from .errors import BundleError
from .manifest import FileDigest, Manifest

if TYPE_CHECKING:
    from .arrays import Array  # not now: numpy takes 0.1 s to import, which pass while threads check the weights


@dataclass(frozen=True)
class Bundle:
    """A checked bundle. `weights` are read-only views into the mapped file, by name; they keep the mapping alive.

    unchecked: the weights' digest was asked for and is still to be found, by who reads them to take them to a GPU.
    """

    path: Path
    manifest: Manifest
    weights: Mapping[str, Array]
    unchecked: bool = False

    @property
    def library(self) -> Path:
        """The compiled code."""
        return self.path / self.manifest.library

    @property
    def tokenizer(self) -> Path:
        """tokenizer.json, checked like every file; BundleError when the bundle was built without one."""
        if "tokenizer.json" not in self.manifest.files:
            raise BundleError(
                f"{self.path}: has no tokenizer.json, so it takes ids, not text. "
                "Use the logits command, or rebuild the bundle from a checkpoint that has a tokenizer."
            )
        return self.path / "tokenizer.json"


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle directory, without looking at the other files or at this machine."""
    if not path.exists():
        raise BundleError(f"{path}: there is no such directory. Point at a directory that quern built.")
    if not path.is_dir():
        raise BundleError(f"{path}: is not a directory. A bundle is a directory with a {manifest.FILE_NAME}.")
    if not (path / manifest.FILE_NAME).is_file():
        raise BundleError(
            f"{path}: has no {manifest.FILE_NAME}, so it is not a bundle. Point at a directory that quern built."
        )
    return manifest.load(path / manifest.FILE_NAME)


def open_bundle(
    path: Path,
    verify_weights: bool = True,
    meanwhile: Callable[[Manifest], None] = lambda _: None,
) -> Bundle:
    """Check a bundle and map its weights. `verify_weights=False` skips the digest of the weights file, nothing else.

    A GPU's weights are checked while they are copied there (upload.py), so that a file larger than memory is read once.
    meanwhile: what the caller has to do before it can use the bundle, without running any of its code; called while
    threads check the weights. What it raises comes out, whatever the weights are.
    Raises ManifestError, BundleError (missing, truncated or damaged files) or DeviceError (wrong machine).
    """
    found = read_manifest(path)
    device.require(found.target, str(path))
    _check_sizes(path, found)
    on_gpu = found.target.gpu is not None
    with _mapped(path / found.weights.file, found, not on_gpu, verify_weights and not on_gpu) as mapping:
        _check_digests(path, found, but=found.weights.file)
        meanwhile(found)
    return Bundle(path, found, _arrays(mapping, found), verify_weights and on_gpu)


def missing(path: Path, found: Manifest) -> list[str]:
    """Why the bundle cannot be whole, by the names and sizes of its files; what is in them is for `open_bundle`."""
    problems = []
    for name, digest in sorted(found.files.items()):
        try:
            _check_size(path / name, digest)
        except BundleError as error:  # noqa: PERF203 a dozen files
            problems.append(str(error).rstrip("."))
    return problems


def require_whole(path: Path, found: Manifest) -> None:
    """Read every file, on whichever machine, and raise BundleError for the first that is not what its digest says."""
    _check_sizes(path, found)
    _check_digests(path, found)


def _check_sizes(path: Path, found: Manifest) -> None:
    for name, digest in sorted(found.files.items()):
        _check_size(path / name, digest)


def _check_size(path: Path, digest: FileDigest) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}. Copy the bundle again.") from None
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: is not a regular file. Copy the bundle again.")
    if status.st_size != digest.bytes:
        raise BundleError(
            f"{path}: has {status.st_size} bytes, but the manifest says {digest.bytes}. Copy the bundle again."
        )


def _check_digests(path: Path, found: Manifest, but: str = "") -> None:
    for name, digest in sorted(found.files.items()):
        if name != but:
            _check_digest(path / name, digest)


def _check_digest(path: Path, digest: FileDigest) -> None:
    """Small files: read and hash, whole or in the manifest's chunks."""
    try:
        found = manifest.digest_file(path, digest.chunk_bytes)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}. Copy the bundle again.") from None
    if found != digest:
        raise _damaged(path, "its SHA-256 is not the manifest's")


@contextmanager
def _mapped(path: Path, found: Manifest, ahead: bool, verify: bool) -> Iterator[Optional[mmap.mmap]]:
    """Map the weights. If asked, start reading them ahead, and threads check them while the block runs; the block's own

    error wins, otherwise a wrong digest raises at its end. None when there are no weights.
    """
    if not found.weights.tensors:
        yield None
        return
    try:
        with path.open("rb") as stream:
            mapping = mmap.mmap(stream.fileno(), found.files[path.name].bytes, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise BundleError(f"{path}: cannot be mapped into memory: {reason}.") from None
    if ahead:
        _read_ahead(mapping)
    if not verify:
        yield mapping
        return
    with _checking(path, mapping, found.files[path.name]):
        yield mapping


def _read_ahead(mapping: mmap.mmap) -> None:
    """Have the kernel read the file, in pages of 2 MiB if it has them.

    What is not yet in the page cache then comes in large pages, where the file system has them (ext4 since Linux 6.16,
    XFS), and later processes find it so. A token reads some 300 pages instead of 160 000: tuning_logs/LOG.md.
    """
    with suppress(OSError):  # a kernel without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    mapping.madvise(mmap.MADV_WILLNEED)


@contextmanager
def _checking(path: Path, mapping: mmap.mmap, digest: FileDigest) -> Iterator[None]:
    """Hash the chunks in threads (hashlib lets go of the interpreter lock). Warms the mapping, too."""
    from concurrent.futures import ThreadPoolExecutor

    step, expected = digest.piece_bytes, digest.pieces

    def intact(index: int) -> bool:
        with memoryview(mapping) as view, view[index * step : (index + 1) * step] as chunk:
            return hashlib.sha256(chunk).hexdigest() == expected[index]

    pool = ThreadPoolExecutor(device.default_threads())
    checks = [pool.submit(intact, index) for index in range(len(expected))]
    try:
        yield
        for index, check in enumerate(checks):
            if not check.result():
                raise damaged_chunk(path, digest, index)
    finally:
        for check in checks:
            check.cancel()
        pool.shutdown()


def _arrays(mapping: Optional[mmap.mmap], found: Manifest) -> dict[str, Array]:
    """The mapping cut into arrays."""
    if mapping is None:
        return {}
    from . import arrays

    return {t.name: arrays.mapped(mapping, t.offset, t.shape, t.dtype) for t in found.weights.tensors}


def damaged_chunk(path: Path, digest: FileDigest, index: int) -> BundleError:
    """What to say of a chunk of the weights whose digest is wrong."""
    step = digest.piece_bytes
    end = min((index + 1) * step, digest.bytes)
    return _damaged(path, f"the SHA-256 of bytes {index * step} to {end - 1} is not the manifest's")


def _damaged(path: Path, what: str) -> BundleError:
    return BundleError(f"{path}: is damaged: {what}. Copy the bundle again or rebuild it.")
