"""Timing of kernels beside each other, for tuning: on this machine (compiler/tune/local_worker.py) and on boards.

Candidates take turns, so that a machine that becomes slower becomes so for all of them. Beside them run canaries, whose
speed no knob changes: if they drift, the machine had other things to do, or became too hot.
"""

from __future__ import annotations

import mmap
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

LEAST_CALLS, SLOT_S = 2, 0.012  # what a candidate gets in a round
READS = 5  # a round: one takes a millisecond, and somebody else's millisecond is not the memory's speed
LARGE_PAGES_SINCE = (6, 16)  # Linux: ext4, too, caches files in pages of 2 MiB, which bundle.py asks for
SPINS = 3  # timings of the canary that counts clock cycles, before and after a batch; the fastest counts


def times(
    call: Callable[[Any], float],
    functions: Sequence[Any],
    rounds: int,
    read: Callable[[], float],
    spin: Optional[Callable[[], float]] = None,
) -> dict[str, Any]:
    """Seconds of every call, as `call` gives them, by round and function; GB/s of the reader after every round, the
    best of a few; seconds of the spinning canary before the first round and after every one, where there is one; and
    the share of all processors that others took meanwhile.

    Functions take turns, in an order that turns from round to round, so that nobody always follows the same one.
    """
    reads, slots, before, count = [], [], processor_seconds(), len(functions)
    spins = [fastest_spin(spin)] if spin is not None else []
    for n in range(rounds):
        order = [(n + i) % count for i in range(count)] if count else []
        row = {place: slot(call, functions[place]) for place in order}
        slots.append([row[place] for place in range(count)])
        reads.append(max(read() for _ in range(READS)))
        if spin is not None:
            spins.append(fastest_spin(spin))
    foreign = foreign_share(before, processor_seconds())
    return {"seconds": slots, "reads": reads, "spins": spins, "foreign": foreign}


def fastest_spin(spin: Callable[[], float]) -> float:
    """The best of a few: an interrupt in one of them is no drift."""
    return min(spin() for _ in range(SPINS))


def slot(call: Callable[[Any], float], function: Any) -> list[float]:
    """One function's calls of a round; the first is not counted, it warms the code and the activations."""
    call(function)
    found: list[float] = []
    end = time.perf_counter() + SLOT_S
    while len(found) < LEAST_CALLS or time.perf_counter() < end:
        found.append(call(function))
    return found


def seconds(act: Callable[..., Any], *arguments: Any) -> float:
    """Of this machine's clock, for one call."""
    started = time.perf_counter()
    act(*arguments)
    return time.perf_counter() - started


def memory(nbytes: int, release: Optional[str] = None) -> mmap.mmap:
    """Fresh memory in pages like those of a cached weights file: 2 MiB since LARGE_PAGES_SINCE, 4 KiB before."""
    # Private: shared memory takes its pages by a rule of its own, which is 4 KiB on most machines.
    area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    found = tuple(map(int, re.findall(r"[0-9]+", release or os.uname().release)[:2]))
    with suppress(OSError):  # a kernel that has no large pages at all
        area.madvise(mmap.MADV_HUGEPAGE if found >= LARGE_PAGES_SINCE else mmap.MADV_NOHUGEPAGE)
    return area


def page_kib(nbytes: int, smaps: Path = Path("/proc/self/smaps_rollup")) -> Optional[int]:
    """What most of `nbytes` of written memory came in, 2048 or 4; None where Linux does not tell."""
    try:
        found = re.search(r"^AnonHugePages:\s*([0-9]+) kB", smaps.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else 2048 if 2048 * int(found[1]) >= nbytes else 4


def copies(one: int, least_bytes: int, most_copies: int) -> int:
    """How many sets of streamed arguments, `one` bytes each, are too much for the caches."""
    return min(max(1, -(-least_bytes // one)), most_copies) if one else 1


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
    whole, busy, own = (b - a for a, b in zip(before, after))  # noqa: B905  strict= needs Python 3.10
    return max(0.0, busy - own) / whole if whole > 0 else 0.0
