"""weights.bin: every weight in its kernel's layout, aligned, in the graph's order, written and digested in pieces."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import CHUNK_BYTES, FileDigest, Weight, Weights, digest_of_chunks

ALIGNMENT = 64  # bytes: a cache line, and one AVX-512 load
NAMES = {"uint16": "bfloat16"}  # numpy has no bfloat16


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of a weight, or all of them. dtype and shape are the whole weight's; uint16 holds bfloat16's bits."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.generic]


def write(path: Path, pieces: Iterable[Piece]) -> tuple[Weights, FileDigest]:
    """Write the pieces, those of a weight one behind the other; the results say where each weight lies.

    Chunks of the file are digested in threads as they become full: hashlib lets go of the interpreter lock, and what
    was just written is still in the page cache.
    """
    tensors: list[Weight] = []
    chunks: list[Future[str]] = []
    with path.open("w+b", buffering=0) as file, ThreadPoolExecutor(os.cpu_count()) as pool:

        def append(data: NDArray[np.uint8]) -> None:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]

        def digest(to: int) -> None:
            full = range(len(chunks) * CHUNK_BYTES, to - CHUNK_BYTES + 1, CHUNK_BYTES)
            chunks.extend([pool.submit(_digest, file.fileno(), start) for start in full])

        for piece in pieces:
            if not tensors or tensors[-1].name != piece.name:
                _check_full(tensors, file.tell())
                append(np.zeros(-file.tell() % ALIGNMENT, np.uint8))
                nbytes = int(np.prod(piece.shape)) * np.dtype(piece.dtype).itemsize
                dtype = NAMES.get(piece.dtype, piece.dtype)
                tensors.append(Weight(piece.name, dtype, tuple(piece.shape), file.tell(), nbytes))
            append(np.ascontiguousarray(piece.data).reshape(-1).view(np.uint8))
            digest(file.tell())
        _check_full(tensors, file.tell())
        append(np.zeros(-file.tell() % ALIGNMENT, np.uint8))
        size = file.tell()
        digest(size + CHUNK_BYTES - 1)
        found = tuple(chunk.result() for chunk in chunks)
    return Weights(path.name, ALIGNMENT, tuple(tensors)), FileDigest(size, digest_of_chunks(found), CHUNK_BYTES, found)


def _digest(handle: int, start: int) -> str:
    return hashlib.sha256(os.pread(handle, CHUNK_BYTES, start)).hexdigest()


def _check_full(tensors: list[Weight], end: int) -> None:
    """The pieces of the last weight must add up to it."""
    assert not tensors or tensors[-1].offset + tensors[-1].nbytes == end, (tensors[-1], end)
