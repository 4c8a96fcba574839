"""The process that compiles and times candidates, so that one that hangs or crashes takes nothing else with it.

`python -m compiler.tune.worker FD` speaks pickled tuples over a pipe: a command and its arguments, answered by
("ok", value) or ("failed", message). TVM_NUM_THREADS is set by whoever starts it. Commands: `open`, `prepare`, `time`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from compiler.measure import read_bandwidth
from compiler.tune import inputs
from schedules.kernel import Kernel, Request, lowerings
from targets import Target

ALIGNMENT = 64  # as in a weights file
MOST_COPIES = 4096  # of small weights: beyond it the calls cost more than the memory
READ_BYTES = 32 << 20  # of the arena, each time that the reader is timed
READS = 5  # a round: one takes a millisecond, and somebody else's millisecond is not the memory's speed
LEAST_CALLS, SLOT_S = 2, 0.012  # what a candidate gets in a round
# Rows differ in the order of their fp32 sums only: some thousand roundings of 2^-24 each, far below this share of the
# largest result, and a kernel that forgets a block is far above it.
TOLERANCE = 1e-4
PR_SET_PDEATHSIG = 1

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

    def call(self, function: Any) -> None:
        """With the copies of the weights that have not been used for longest."""
        self.turn = (self.turn + 1) % len(self.sets)
        function(*self.sets[self.turn], *self.outs)

    def read(self) -> float:
        """GB/s of the fastest reader."""
        self.turn += 1
        started = time.perf_counter()
        function, out = self.reader
        function(self.windows[self.turn % len(self.windows)], out)
        return READ_BYTES / (time.perf_counter() - started) / 1e9


def lower(request: Request, knobs: Mapping[str, int]) -> Kernel:
    """The kernel of a request with these knobs."""
    return lowerings()[request.op](replace(request, knobs=dict(knobs)))


def compiled(func: Any, target: Target) -> Any:
    """A function of tensors, in this process."""
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=tvm.target.Target(target.tvm_target()))["main"]


def arena(nbytes: int) -> np.ndarray:
    """Fresh memory in pages of 4 KiB, as the runtime's mapping of the weights file has them."""
    area = mmap.mmap(-1, nbytes)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(area, np.uint8)


def open_workload(request: Request, default: Mapping[str, int], least_bytes: int) -> Workload:
    """Arguments, as many copies of what is streamed as make `least_bytes`, the default kernel and its results."""
    kernel, arrays = lower(request, default), inputs.canonical(request)
    names = list(arrays)
    for i, packing in kernel.packings.items():
        arrays[names[i]] = packing.pack(arrays[names[i]])
    streamed = [name for name in names if name in inputs.STREAMED]
    sizes = {name: -(-arrays[name].nbytes // ALIGNMENT) * ALIGNMENT for name in streamed}
    one = sum(sizes.values())
    copies = min(max(1, -(-least_bytes // one)), MOST_COPIES) if one else 1
    memory = arena(max(copies * one, READ_BYTES))
    held = {name: tvm.runtime.tensor(array) for name, array in arrays.items() if name not in sizes}
    sets, place = [], 0
    for _ in range(copies):
        views = {}
        for name, size in sizes.items():
            array = arrays[name]
            view = memory[place : place + array.nbytes].view(array.dtype).reshape(array.shape)
            view[...] = array
            views[name] = tvm.runtime.from_dlpack(view)
            place += size
        sets.append([views.get(name, held.get(name)) for name in names])
    outs = [tvm.runtime.tensor(np.zeros(out.shape, out.dtype)) for out in request.outs]
    function = compiled(kernel.func, request.target)
    function(*sets[0], *outs)
    pin()
    made = Workload(
        request, kernel, sets, outs, [out.numpy() for out in outs], copies * one,
        sum(arrays[name].nbytes for name in streamed) * inputs.read_share(request), [function], None, windows(memory),
    )  # fmt: skip
    made.reader = fastest_reader(made)
    return made


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
    kernel = lower(workload.request, knobs)
    if {i: p.name for i, p in kernel.packings.items()} != {i: p.name for i, p in workload.default.packings.items()}:
        raise ValueError("these knobs change the layout of the weights")
    function = compiled(kernel.func, workload.request.target)
    for out in workload.outs:
        out.copyfrom(np.full(out.shape, 77, str(out.dtype)))
    function(*workload.sets[0], *workload.outs)
    for out, want in zip(workload.outs, workload.reference, strict=True):
        error = np.abs(out.numpy().astype(np.float64) - want).max()
        if not error <= TOLERANCE * np.abs(want).max():
            raise ValueError(f"wrong results: off by {error:.3g} from the default's, whose largest is {want.max():.3g}")
    workload.functions.append(function)
    return len(workload.functions) - 1


def times(workload: Workload, numbers: list[int], rounds: int) -> dict[str, Any]:
    """Seconds of every call, by round and candidate; GB/s of the reader after every round, the best of a few; and the
    share of all processors that others took meanwhile.

    Candidates take turns, in an order that turns from round to round, so that nobody always follows the same one.
    """
    reads, seconds, before = [], [], processor_seconds()
    for n in range(rounds):
        order = numbers[n % len(numbers) :] + numbers[: n % len(numbers)]
        row = {number: slot(workload, workload.functions[number]) for number in order}
        seconds.append([row[number] for number in numbers])
        reads.append(max(workload.read() for _ in range(READS)))
    return {"seconds": seconds, "reads": reads, "foreign": foreign_share(before, processor_seconds())}


def processor_seconds(stat: Path = Path("/proc/stat")) -> tuple[float, float, float]:
    """Now, as monotonic seconds times processors; what all processors were busy for, a hypervisor's thefts included;
    and this process's part of it.
    """
    # user nice system idle iowait irq softirq steal guest guest_nice, in ticks; the guests' are in user and nice, too
    ticks = [int(word) for word in stat.read_text().splitlines()[0].split()[1:9]]
    busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() * (os.cpu_count() or 1), busy, time.process_time()


def foreign_share(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """The part of all processors' time that was neither idle nor ours."""
    whole, busy, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, busy - own) / whole


def slot(workload: Workload, function: Any) -> list[float]:
    """One candidate's calls of a round; the first is not counted, it warms the code and the activations."""
    workload.call(function)
    found: list[float] = []
    end = time.perf_counter() + SLOT_S
    while len(found) < LEAST_CALLS or time.perf_counter() < end:
        started = time.perf_counter()
        workload.call(function)
        found.append(time.perf_counter() - started)
    return found


class Worker:
    """The commands."""

    def __init__(self) -> None:
        self.workload: Workload | None = None

    def open(self, request: Request, default: Mapping[str, int], least_bytes: int) -> dict[str, float]:
        """Take up a workload; the one before is forgotten."""
        self.workload = None
        self.workload = open_workload(request, default, least_bytes)
        return {"rotated_bytes": self.workload.rotated_bytes, "bytes_per_call": self.workload.bytes_per_call}

    def prepare(self, knobs: Mapping[str, int]) -> int:
        """See `prepare`."""
        assert self.workload is not None
        return prepare(self.workload, knobs)

    def time(self, numbers: list[int], rounds: int) -> dict[str, Any]:
        """See `times`."""
        assert self.workload is not None
        return times(self.workload, numbers, rounds)


def main(descriptor: int) -> None:
    """Answer until the other end is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # tuning was killed: do not go on alone
    connection, worker = Connection(descriptor), Worker()
    while True:
        try:
            command, *arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = ("ok", getattr(worker, command)(*arguments))
        except Exception as error:  # whatever TVM makes of a candidate is a result
            answer = ("failed", f"{type(error).__name__}: {error}"[-500:])
        connection.send(answer)


if __name__ == "__main__":
    main(int(sys.argv[1]))
