"""weights.bin: every weight in its kernel's layout, aligned, in the graph's order, written and digested in pieces."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import CHUNK_BYTES, FileDigest, Weight, Weights, digest_of_chunks

ALIGNMENT = 64  # bytes: a cache line, and one AVX-512 load
LARGE, PAGE = 1 << 16, 4096  # bytes: an array of so many begins a page, which a hardware prefetcher does not leave
GPU_ALIGNMENT = 256  # what a GPU's own allocator gives
NAMES = {"uint16": "bfloat16"}  # numpy has no bfloat16
CHUNKS_AHEAD = 3  # full chunks that wait for their digest or for the disk


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of a weight, or all of them. dtype and shape are the whole weight's; uint16 holds bfloat16's bits."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.generic]


def write(path: Path, pieces: Iterable[Piece], alignment: int = ALIGNMENT) -> tuple[Weights, FileDigest]:
    """Write the pieces, those of a weight one behind the other; the results say where each weight lies."""
    tensors: list[Weight] = []
    with _File(path) as file:
        for piece in pieces:
            if not tensors or tensors[-1].name != piece.name:
                _check_full(tensors, file.size)
                nbytes = int(np.prod(piece.shape)) * np.dtype(piece.dtype).itemsize
                file.append(np.zeros(-file.size % (PAGE if nbytes >= LARGE else alignment), np.uint8))
                dtype = NAMES.get(piece.dtype, piece.dtype)
                tensors.append(Weight(piece.name, dtype, tuple(piece.shape), file.size, nbytes))
            file.append(np.ascontiguousarray(piece.data).reshape(-1).view(np.uint8))
        _check_full(tensors, file.size)
        file.append(np.zeros(-file.size % alignment, np.uint8))
        digest = file.finish()
    return Weights(path.name, alignment, tuple(tensors)), digest


def _check_full(tensors: list[Weight], end: int) -> None:
    """The pieces of the last weight must add up to it."""
    assert not tensors or tensors[-1].offset + tensors[-1].nbytes == end, (tensors[-1], end)


class _File:
    """Bytes are appended to a chunk; a full one is digested and written in a thread while the next one fills.

    Full chunks go past the page cache where the file system can do that: the cache would copy every byte once more, and
    keep gigabytes that the device needs and not this machine.
    """

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._handles = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)]
        with suppress(OSError):  # a file system that has no direct writes says so here or at the first one
            self._handles.append(os.open(path, os.O_WRONLY | getattr(os, "O_DIRECT", 0)))
        self._pool = ThreadPoolExecutor(CHUNKS_AHEAD)
        self._free = [np.frombuffer(mmap.mmap(-1, CHUNK_BYTES), np.uint8) for _ in range(CHUNKS_AHEAD + 1)]
        self._busy: deque[tuple[Future[str], NDArray[np.uint8]]] = deque()
        self._digests: list[str] = []

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        for handle in self._handles:
            os.close(handle)

    def append(self, data: NDArray[np.uint8]) -> None:
        """u8[any]."""
        while data.size:
            at = self.size % CHUNK_BYTES
            count = min(data.size, CHUNK_BYTES - at)
            self._free[0][at : at + count] = data[:count]
            self.size += count
            data = data[count:]
            if self.size % CHUNK_BYTES == 0:
                self._hand_over(CHUNK_BYTES)

    def finish(self) -> FileDigest:
        """Write what is left and give the digest; nothing may be appended any more."""
        if rest := self.size % CHUNK_BYTES:
            self._hand_over(rest)
        while self._busy:
            self._take_back()
        return FileDigest(self.size, digest_of_chunks(self._digests), CHUNK_BYTES, tuple(self._digests))

    def _hand_over(self, count: int) -> None:
        chunk = self._free.pop(0)
        handle = self._handles[-1 if count == CHUNK_BYTES else 0]
        self._busy.append((self._pool.submit(self._put, handle, chunk[:count], self.size - count), chunk))
        if not self._free:
            self._take_back()

    def _take_back(self) -> None:
        written, chunk = self._busy.popleft()
        self._digests.append(written.result())
        self._free.append(chunk)

    def _put(self, handle: int, chunk: NDArray[np.uint8], start: int) -> str:
        digest = hashlib.sha256(chunk.data).hexdigest()
        try:
            _write_all(handle, chunk, start)
        except OSError:
            if handle == self._handles[0]:
                raise
            _write_all(self._handles[0], chunk, start)
        return digest


def _write_all(handle: int, data: NDArray[np.uint8], start: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:].data, start + done)
