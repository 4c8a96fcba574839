"""Timing of candidates on this machine: interleaved with the default and with a reader of memory, in a process apart.

`Measurer` is what tuning needs of a device; `LocalMeasurer` is this machine. A batch whose canaries (the reader before
every round, and the default kernel in it) drift is thrown away and repeated: the machine had other things to do.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from schedules.kernel import Request, Space

REPOSITORY = Path(__file__).parents[2]
LEAST_BYTES = 400 << 20  # of rotated weights, or four times the last-level cache, whichever is more
DRIFT = 0.25  # how far a canary's quartiles may lie apart, as a share of its median: idle machines show 0.02 to 0.10
FOREIGN = 0.08  # of all processors' time, taken by other processes: a busy neighbour slows everything, without a drift
REPEATS, PAUSE_S = 5, 0.25  # of a batch that drifted; the pause before it doubles every time
REPLY_S = 60.0  # to compile one candidate, to run it, or to time a batch: seconds are usual
OPEN_S = 300.0  # to load TVM and fill the arena
STEP_S = 0.5  # replies are waited for in steps: while this process is stopped, at most one of them runs out

Knobs = Mapping[str, int]


class NoisyError(Exception):
    """The machine is too busy to time anything on it; nothing of the batch may be recorded."""


class CandidateLost(Exception):
    """The worker hung or died over what it was asked; the message says which."""


@dataclass(frozen=True)
class Setting:
    """What made a record: threads, CPU model, versions; `measured` says by what clock."""

    threads: int
    cpu: str
    tvm: str
    commit: str
    measured: str = "local"

    @classmethod
    def here(cls, threads: int) -> Setting:
        """This machine and this tree."""
        return cls(threads, cpu_model(), version("apache-tvm"), commit())


@dataclass(frozen=True)
class Timing:
    """One candidate in one batch. seconds: all calls; speedups: the default's median / its own, by round."""

    seconds: list[float]
    speedups: list[float]
    failure: str | None = None


@dataclass(frozen=True)
class Batch:
    """What was measured together: a timing for every candidate, the default's, the reader's GB/s by round."""

    timings: list[Timing]
    default: Timing
    reads: list[float]
    rotated_bytes: int
    bytes_per_call: float
    foreign: float = 0.0  # share of the processors' time that other processes took


class Measurer(Protocol):
    """A device that times candidates."""

    setting: Setting

    def measure(self, request: Request, space: Space, candidates: Sequence[Knobs], rounds: int) -> Batch:
        """Failures are part of the batch. Raises NoisyError when no batch was quiet."""

    def close(self) -> None:
        """Let go of the device."""


def drift(values: Sequence[float]) -> float:
    """Distance of the quartiles as a share of the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


@dataclass
class LocalMeasurer:
    """This machine, through a worker process that is replaced when it hangs or crashes."""

    setting: Setting
    reply_s: float = REPLY_S
    most_drift: float = DRIFT
    least_bytes: int = field(default_factory=lambda: max(LEAST_BYTES, 4 * last_level_cache_bytes()))
    _process: subprocess.Popen[bytes] | None = None
    _connection: Connection | None = None
    _opened: Request | None = None
    _size: dict[str, float] = field(default_factory=dict)
    _quickest_s: float = math.inf  # the default's best median since the workload was opened

    def start(self) -> None:
        """Start the worker, which loads TVM for some seconds; `measure` does it too."""
        if self._process is None:
            ours, its = Pipe()
            environment = {**os.environ, "TVM_NUM_THREADS": str(self.setting.threads)}
            paths = [str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
            command = [sys.executable, "-m", "compiler.tune.worker", str(its.fileno())]
            # A session of its own: Ctrl-C is for us, and we end it.
            self._process = subprocess.Popen(
                command, env=environment, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
            its.close()
            self._connection = ours

    def close(self) -> None:
        """Kill the worker."""
        if self._process is not None and self._connection is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
        self._process = self._connection = self._opened = None

    def measure(self, request: Request, space: Space, candidates: Sequence[Knobs], rounds: int) -> Batch:
        """See Measurer."""
        numbers, failures = self._prepare(request, space, candidates)
        for repeat in range(REPEATS):
            answer = self._ask("time", [0, *numbers.values()], rounds)
            batch = self._batch(answer, list(numbers), failures, len(candidates))
            worst = self._drift(batch)
            if worst <= self.most_drift and batch.foreign <= self._most_foreign():
                return batch
            time.sleep(PAUSE_S * 2**repeat)
        raise NoisyError(
            f"other processes take {batch.foreign:.0%} of the processors, and the speed of one kernel drifts by "
            f"{worst:.0%} ({self.most_drift:.0%} is the limit)"
        )

    def _most_foreign(self) -> float:
        """Processors that our threads leave idle are for everyone; of ours, as much more as drift is allowed."""
        unused = max(0.0, 1 - self.setting.threads / (os.cpu_count() or 1))
        return unused + FOREIGN * self.most_drift / DRIFT

    def _drift(self, batch: Batch) -> float:
        """The worst of: the reader in this batch, the default kernel in it, the default against its best batch."""
        median = statistics.median(batch.default.seconds)
        self._quickest_s = min(self._quickest_s, median)
        return max(drift(batch.reads), drift(batch.default.speedups), median / self._quickest_s - 1)

    def _prepare(
        self, request: Request, space: Space, candidates: Sequence[Knobs]
    ) -> tuple[dict[int, int], dict[int, str]]:
        """Worker's number, or failure, of every candidate by its place. Those that a lost worker had are made again."""
        failures: dict[int, str] = {}
        while True:
            numbers: dict[int, int] = {}
            try:
                self._open(request, space)
                for place, knobs in enumerate(candidates):
                    if place not in failures:
                        try:
                            numbers[place] = self._ask("prepare", knobs)
                        except CandidateFailed as error:
                            failures[place] = str(error)
                return numbers, failures
            except CandidateLost as error:
                place = next(p for p in range(len(candidates)) if p not in numbers and p not in failures)
                failures[place] = str(error)

    def _open(self, request: Request, space: Space) -> None:
        """Have the worker take up a workload, unless it has it in hand from the batch before."""
        self.start()
        if self._opened == request:
            return
        try:
            self._size = self._ask("open", request, dict(space.default), self.least_bytes, within=OPEN_S)
            self._opened, self._quickest_s = request, math.inf
        except (CandidateFailed, CandidateLost) as error:
            self.close()
            what = f"{space.schedule} {dict(space.workload)}"
            raise RuntimeError(f"{what}: the default schedule failed: {error}") from error

    def _ask(self, *message: Any, within: float | None = None) -> Any:
        assert self._connection is not None
        seconds = self.reply_s if within is None else within
        try:
            self._connection.send(message)
            if not any(self._connection.poll(STEP_S) for _ in range(math.ceil(seconds / STEP_S))):
                raise CandidateLost(f"no answer within {seconds:g} s")
            status, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.wait()  # type: ignore[union-attr]
            code = self._process.returncode  # type: ignore[union-attr]
            self.close()
            raise CandidateLost(f"the process ended with {code}") from None
        except CandidateLost:
            self.close()
            raise
        if status == "failed":
            raise CandidateFailed(value)
        return value

    def _batch(self, answer: dict[str, Any], places: list[int], failures: dict[int, str], count: int) -> Batch:
        rounds = answer["seconds"]
        medians = [[statistics.median(slot) for slot in row] for row in rounds]
        base = statistics.median(row[0] for row in medians)

        def timing(column: int) -> Timing:
            seconds = [s for row in rounds for s in row[column]]
            return Timing(seconds, [row[0] / row[column] for row in medians])

        default = Timing([s for row in rounds for s in row[0]], [base / row[0] for row in medians])
        found = {place: timing(1 + i) for i, place in enumerate(places)}
        found |= {place: Timing([], [], why) for place, why in failures.items()}
        timings = [found[place] for place in range(count)]
        size = self._size
        rotated, read = int(size["rotated_bytes"]), size["bytes_per_call"]
        return Batch(timings, default, answer["reads"], rotated, read, answer["foreign"])


class CandidateFailed(Exception):
    """The worker could not compile a candidate, or its results were wrong."""


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU as the kernel names it."""
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    named = (line for line in text.splitlines() if line.startswith(("model name", "CPU part")))
    return next(named, ": unknown").partition(":")[2].strip()


def last_level_cache_bytes(cpu: Path = Path("/sys/devices/system/cpu/cpu0")) -> int:
    """Size of the largest cache that the kernel tells of, 0 where it tells of none."""
    sizes = [0]
    for path in cpu.glob("cache/index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(sizes)


def commit() -> str:
    """The tree's commit, with a + when the code that makes kernels has changes; "unknown" outside of a repository."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        code = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "compiler", "schedules", "targets"], check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if code.returncode else "")
