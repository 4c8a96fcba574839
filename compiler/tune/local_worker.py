"""The process that compiles candidates for this machine and times them: `python -m compiler.tune.local_worker FD`.

TVM_NUM_THREADS is set by whoever starts it. Commands: `open`, `prepare`, `time`.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import tvm

from compiler.measure import read_bandwidth
from compiler.tune import candidates
from compiler.tune.candidates import MOST_COPIES, READ_BYTES, padded
from runtime import timing
from schedules.kernel import Kernel, Request
from targets import Target

Arguments = list[Any]


@dataclass
class Workload:
    """One operator call under measurement: its arguments in memory, its default kernel, candidates by number."""

    request: Request
    default: Kernel
    sets: list[Arguments]
    outs: list[Any]
    reference: list[np.ndarray]
    rotated_bytes: int
    bytes_per_call: float
    functions: list[Any]
    reader: Any
    windows: list[Any]
    turn: int = 0

    def call(self, function: Any) -> float:
        """Seconds with the copies of the weights that have not been used for longest."""
        self.turn = (self.turn + 1) % len(self.sets)
        return timing.seconds(function, *self.sets[self.turn], *self.outs)

    def read(self) -> float:
        """GB/s of the fastest reader."""
        self.turn += 1
        function, out = self.reader
        return READ_BYTES / timing.seconds(function, self.windows[self.turn % len(self.windows)], out) / 1e9


def arena(nbytes: int) -> np.ndarray:
    """Fresh memory in pages as a mapped weights file would have them."""
    return np.frombuffer(timing.memory(nbytes), np.uint8)


def open_workload(request: Request, default: Mapping[str, int], least_bytes: int) -> Workload:
    """Arguments, as many copies of what is streamed as make `least_bytes`, the default kernel and its results."""
    made = candidates.Call.of(request, default)
    arrays = made.arrays
    one = sum(padded(arrays[name].nbytes) for name in made.streamed)
    copies = timing.copies(one, least_bytes, MOST_COPIES)
    memory = arena(max(copies * one, READ_BYTES))
    held = {name: tvm.runtime.tensor(array) for name, array in arrays.items() if name not in made.streamed}
    sets, place = [], 0
    for _ in range(copies):
        views = {}
        for name in made.streamed:
            array = arrays[name]
            view = memory[place : place + array.nbytes].view(array.dtype).reshape(array.shape)
            view[...] = array
            views[name] = tvm.runtime.from_dlpack(view)
            place += padded(array.nbytes)
        sets.append([views.get(name, held.get(name)) for name in arrays])
    outs = [tvm.runtime.tensor(np.zeros(out.shape, out.dtype)) for out in request.outs]
    assert isinstance(made.kernel, Kernel), "a GPU's kernels are timed over RPC"
    function = compiled(made.kernel.func, request.target)
    function(*sets[0], *outs)
    pin()
    opened = Workload(
        request, made.kernel, sets, outs, [out.numpy() for out in outs], copies * one, made.bytes_per_call, [function],
        None, windows(memory),
    )  # fmt: skip
    opened.reader = fastest_reader(opened)
    return opened


def compiled(func: Any, target: Target) -> Any:
    """A function of tensors, in this process."""
    return candidates.generate({"main": func}, target)["main"]


def pin() -> None:
    """The calling thread to its first CPU: TVM pins the others to the ones after it, and leaves this one free."""
    if os.environ["TVM_NUM_THREADS"] != "1":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def windows(memory: np.ndarray) -> list[Any]:
    """The arena in pieces for the reader."""
    count = memory.nbytes // READ_BYTES
    pieces = memory[: count * READ_BYTES].view(np.int32).reshape(count, -1)
    return [tvm.runtime.from_dlpack(piece) for piece in pieces]


@cache
def readers(target: Target) -> list[Any]:
    """Every variant of compiler.measure.read_bandwidth."""
    return [compiled(read_bandwidth.kernel(READ_BYTES, *variant), target) for variant in read_bandwidth.VARIANTS]


def fastest_reader(workload: Workload) -> Any:
    """The reader that reads this arena fastest, and its output."""
    out = tvm.runtime.tensor(np.zeros((read_bandwidth.SLICES, read_bandwidth.LANES), np.int32))
    speeds = []
    for function in readers(workload.request.target):
        workload.reader = (function, out)
        speeds.append((statistics.median(workload.read() for _ in range(8)), workload.reader))
    return max(speeds, key=lambda pair: pair[0])[1]


def prepare(workload: Workload, knobs: Mapping[str, int]) -> int:
    """Compile a candidate and compare its results with the default's; gives its number for `time`."""
    kernel = candidates.candidate(workload.request, knobs, workload.default)
    assert isinstance(kernel, Kernel)
    function = compiled(kernel.func, workload.request.target)
    for out in workload.outs:
        out.copyfrom(np.full(out.shape, 77, str(out.dtype)))
    function(*workload.sets[0], *workload.outs)
    candidates.check([out.numpy() for out in workload.outs], workload.reference)
    workload.functions.append(function)
    return len(workload.functions) - 1


class Worker:
    """The commands."""

    def __init__(self) -> None:
        self.workload: Workload | None = None

    def open(self, request: Request, default: Mapping[str, int], least_bytes: int) -> dict[str, Any]:
        """Take up a workload; the one before is forgotten."""
        self.workload = None
        self.workload = open_workload(request, default, least_bytes)
        rotated, one = self.workload.rotated_bytes, self.workload.bytes_per_call
        return {"rotated_bytes": rotated, "bytes_per_call": one, "page_kib": timing.page_kib(rotated)}

    def prepare(self, knobs: Mapping[str, int]) -> int:
        """See `prepare`."""
        assert self.workload is not None
        return prepare(self.workload, knobs)

    def time(self, numbers: list[int], rounds: int) -> dict[str, Any]:
        """See runtime.timing.times."""
        assert self.workload is not None
        functions = [self.workload.functions[number] for number in numbers]
        return timing.times(self.workload.call, functions, rounds, self.workload.read)


if __name__ == "__main__":
    candidates.serve(Worker(), int(sys.argv[1]))
