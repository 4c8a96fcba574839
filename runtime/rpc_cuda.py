"""An operator call under measurement on a board's GPU: what rpc_session.Workload is for a CPU.

Candidates are libraries like a CUDA bundle's model.so with one function (compiler/tune/cuda_candidates.py): no compiler
runs here but the driver's for PTX. Arguments lie once in GPU memory, those that are streamed in many copies; every
candidate borrows them and has results and temporaries of its own. The GPU's events tell the time.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

from . import cuda_driver, timing
from .errors import VmError
from .manifest_check import nbytes
from .on_cuda import GRAPHS, TIMED, Model

ALIGNMENT = 256  # bytes, as cuMemAlloc promises
# A burst of calls is timed at once, as a CUDA graph where the driver has them: one alone may take less than the events
# can tell (half a microsecond), and than the CPU needs to launch the next one.
BURST_MS, MOST_CALLS = 0.5, 64
COPIES = 1  # of the canary's, whose first one does not count
LOST = 70  # exit code of a session whose GPU does not answer any more


def about() -> dict[str, object]:
    """The first GPU, or why there is none."""
    found = cuda_driver.find()
    return {"error": found} if isinstance(found, str) else found._asdict()


class Workload:
    """One operator call. Fields as in rpc_session.Workload, but for:

    canaries: a library with one function, `spin`, of a parameter of front_bytes, which counts clock cycles.
    copy_bytes: what the other canary copies within the GPU's memory.
    """

    def __init__(
        self,
        path: Callable[[str], Path],
        *,
        file: str,
        arguments: Sequence[dict[str, Any]],
        outs: Sequence[dict[str, Any]],
        least_bytes: int,
        most_copies: int,
        canaries: str,
        front_bytes: int,
        copy_bytes: int,
    ) -> None:
        self._path, self._copy_bytes, self._turn, self._burst = path, copy_bytes, 0, 0
        held = [a for a in arguments if not a["streamed"]]
        streamed = [a for a in arguments if a["streamed"]]
        start = _up(front_bytes) + sum(_up(a["nbytes"]) for a in held)
        one = sum(_up(a["nbytes"]) for a in streamed)
        self._owner = Model(path(canaries), path(canaries), TIMED)
        room_for_copies = int(self._owner.info.free_bytes) // 4  # the rest is for results, the canary and others
        self.copies = timing.copies(one, min(least_bytes, room_for_copies), most_copies)
        self.rotated_bytes = self.copies * one
        self.page_kib = None  # a GPU's own
        size, spin_place = start + self.rotated_bytes, (ctypes.c_uint64 * 1)(0)
        self._owner.call("quern_memory", ctypes.c_uint64(size), ctypes.c_uint64(0), spin_place)
        data, room = path(file).read_bytes(), _Room(self._owner, _up(front_bytes))
        fixed = [None if a["streamed"] else room.take(a, data) for a in arguments]
        addresses = []
        for _ in range(self.copies):
            for argument, address in zip(arguments, fixed):  # noqa: B905  strict= needs Python 3.10
                addresses.append(room.take(argument, data) if address is None else address)
        self._addresses = (ctypes.c_uint64 * len(addresses))(*addresses)
        self._owner.call("quern_load")
        sizes = [nbytes(out["dtype"], out["shape"]) for out in outs]
        self._outs = [(_up(size), size) for size in sizes]
        self._result = self._owner.host(sum(padded for padded, _ in self._outs))
        self._candidates: list[Optional[Model]] = []
        self._timed = False

    def prepare(self, library: str) -> int:
        """Load a candidate and run it on the first copy; gives its number. Its results are in `outputs`.

        Candidates that were timed before go, but for the first one, the default: their memory is needed.
        """
        if self._timed:
            self._candidates[1:] = [None] * (len(self._candidates) - 1)
            self._timed = False
        model = Model(self._path(library), self._path(library), TIMED | GRAPHS)
        model.call("quern_borrow", self.copies, self._addresses)
        model.call("quern_load")
        _alive(model.call, "quern_run", 0, None, ctypes.c_uint64(0), ctypes.c_void_p(self._result))
        self._candidates.append(model)
        if not self._burst:
            self._measure(model, 1)
            once = self._measure(model, 1)
            self._burst = min(max(1, math.ceil(BURST_MS / once)), MOST_CALLS)
        return len(self._candidates) - 1

    def outputs(self) -> bytes:
        """All outputs, one behind the other."""
        found, place = [], self._result
        for padded, size in self._outs:
            found.append(ctypes.string_at(place, size))
            place += padded
        return b"".join(found)

    def call(self, number: int) -> float:
        """Seconds of a candidate's call, in a burst, with the copies that have not been used for longest."""
        model = self._candidates[number]
        assert model is not None, f"candidate {number} is of an earlier batch"
        self._timed = True
        return self._measure(model, self._burst) / self._burst / 1e3

    def read(self) -> float:
        """GB/s of a copy within the GPU's memory, read and written."""
        found = ctypes.c_double()
        _alive(self._owner.call, "quern_copy_speed", ctypes.c_uint64(self._copy_bytes), COPIES, ctypes.byref(found))
        return found.value

    def spin(self) -> float:
        """Seconds of the canary that counts clock cycles."""
        return self._measure(self._owner, 1) / 1e3

    def _measure(self, model: Model, calls: int) -> float:
        """Milliseconds of a library's only function."""
        found, turn = ctypes.c_float(), self._turn
        if model is not self._owner:
            self._turn = (turn + calls) % self.copies
        _alive(model.call, "quern_measure", 0, turn, calls, ctypes.byref(found))
        return max(found.value, 1e-6)


class _Room:
    """A model's memory, from a byte on."""

    def __init__(self, owner: Model, start: int) -> None:
        self._owner, self._next = owner, start

    def take(self, argument: dict[str, Any], data: bytes) -> int:
        """Copy an argument to the next free place; gives its address."""
        place, size = self._next, argument["nbytes"]
        raw = data[argument["offset"] : argument["offset"] + size]
        self._owner.upload(place, ctypes.c_char_p(raw), size)
        self._next += _up(size)
        return self._owner.weights + place


def _alive(act: Callable[..., None], *arguments: object) -> None:
    """What runs on the GPU. A kernel that fails there leaves nothing usable in its process: the session ends with it.

    Whoever asked meets a lost board, and finds out by another session whose fault it was.
    """
    try:
        act(*arguments)
    except VmError as error:
        sys.stderr.write(f"rpc-server: {error}\n")
        sys.stderr.flush()
        os._exit(LOST)


def _up(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
