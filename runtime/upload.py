"""A weights file to a GPU in one pass: every chunk is read once, copied, and its digest found meanwhile.

Bytes are checked where they were read to, so nothing can change between the check and the copy. Nothing of the bundle
is launched before upload() has returned; what is wrong raises out of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable

from . import device
from .bundle import Bundle, damaged_chunk
from .errors import BundleError

Copy = Callable[[int, Any, int], None]
AHEAD = 1  # chunks that are read while every thread has one
COMING_BYTES = 64 << 20  # that storage is asked for before they are read
THREADS = 4  # at most: they are quicker than any storage, and each holds a chunk


def upload(bundle: Bundle, copy: Copy, evict: bool) -> None:
    """copy(place, data, size): take bytes of the file to the GPU; data, a ctypes array, is used again afterwards.

    evict: drop pages behind us, where GPU and CPU share the memory. Raises BundleError.
    """
    manifest = bundle.manifest
    if not manifest.weights.tensors:
        return
    path, digest = bundle.path / manifest.weights.file, manifest.files[manifest.weights.file]
    step, expected = digest.piece_bytes, digest.pieces
    threads = min(THREADS, device.default_threads()) if bundle.unchecked else 1
    buffers = [(ctypes.c_char * min(step, digest.bytes))() for _ in range(min(threads + AHEAD, len(expected)))]
    checks: list[Future[str]] = []
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(path.open("rb", buffering=0))
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror}. Copy the bundle again.") from None
        pool = ThreadPoolExecutor(threads)
        stack.callback(pool.shutdown, wait=True)

        def require(index: int) -> None:
            if bundle.unchecked and checks[index].result() != expected[index]:
                raise damaged_chunk(path, digest, index)

        for index in range(len(expected)):
            if index >= len(buffers):
                require(index - len(buffers))  # it was in the buffer that comes next
            buffer, start = buffers[index % len(buffers)], index * step
            size = min(step, digest.bytes - start)
            _advise(stream, start, size + COMING_BYTES, os.POSIX_FADV_WILLNEED)
            with memoryview(buffer) as whole, whole.cast("B")[:size] as room:
                if _fill(stream, room) < size:
                    raise BundleError(f"{path}: ends before byte {digest.bytes}. Copy the bundle again.")
            if bundle.unchecked:
                checks.append(pool.submit(_sha256, buffer, size))
            copy(start, buffer, size)
            if evict:
                _advise(stream, start, size, os.POSIX_FADV_DONTNEED)
        for index in range(max(0, len(expected) - len(buffers)), len(expected)):
            require(index)


def _advise(stream: Any, start: int, size: int, advice: int) -> None:
    with contextlib.suppress(OSError):
        os.posix_fadvise(stream.fileno(), start, size, advice)


def _fill(stream: Any, room: memoryview) -> int:
    """Read until `room` is full or the file ends; a read may give less than was asked for."""
    done = 0
    while done < len(room):
        with room[done:] as rest:
            count = stream.readinto(rest)
        if not count:
            break
        done += count
    return done


def _sha256(buffer: Any, size: int) -> str:
    """hashlib lets go of the interpreter lock."""
    with memoryview(buffer) as whole, whole.cast("B")[:size] as data:
        return hashlib.sha256(data).hexdigest()
