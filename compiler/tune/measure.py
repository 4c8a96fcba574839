"""What tuning asks of a device that times candidates, and what all such devices have in common.

`Measurer` is the question. `WorkerMeasurer` answers it through a worker process, which is replaced when it hangs or
crashes: local.py for this machine, boards.py for boards. A batch whose canaries (a reader of memory before every round,
and the default kernel in it) drift is thrown away and repeated: the machine had other things to do.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Protocol

from runtime import board
from schedules.kernel import Request, Space

REPOSITORY = Path(__file__).parents[2]
LEAST_BYTES = 400 << 20  # of rotated weights, or four times the last-level cache, whichever is more
DRIFT = 0.25  # how far a canary's quartiles may lie apart, as a share of its median: idle machines show 0.02 to 0.10
FOREIGN = 0.08  # of all processors' time, taken by other processes: a busy neighbour slows everything, without a drift
REPEATS, PAUSE_S = 5, 0.25  # of a batch that drifted; the pause before it doubles every time
REPLY_S = 60.0  # to compile one candidate, to run it, or to time a batch: seconds are usual
OPEN_S = 300.0  # to load TVM and fill the arena
STEP_S = 0.5  # replies are waited for in steps: while this process is stopped, at most one of them runs out
LOCAL, RPC, EMULATED = "local", "rpc", "emulated"  # by what clock a record was measured
MODEL = "model"  # by none: counted instructions, and cycles of a model of the pipeline

Knobs = Mapping[str, int]


class NoisyError(Exception):
    """The machine is too busy or too hot to time anything on it; nothing of the batch may be recorded."""


class DeviceLost(Exception):
    """The device is gone, or fails with the default kernel alone; nothing of the batch may be recorded."""


class CandidateLost(Exception):
    """The worker, or the board, hung or died over what it was asked; the message says which."""


class CandidateFailed(Exception):
    """A candidate could not be compiled, or its results were wrong."""


@dataclass(frozen=True)
class Device:
    """A GPU as its driver tells it. All Orins are called "Orin": only their sizes tell them apart."""

    name: str
    multiprocessors: int

    def __str__(self) -> str:
        return f"{self.name} with {self.multiprocessors} multiprocessors"


@dataclass(frozen=True)
class Setting:
    """What made a record: threads, CPU model, versions; `measured` says by what clock; a GPU where one computed."""

    threads: int
    cpu: str
    tvm: str
    commit: str
    measured: str = LOCAL
    gpu: Device | None = None

    @classmethod
    def here(cls, threads: int) -> Setting:
        """This machine and this tree."""
        return cls(threads, board.cpu_model(), version("apache-tvm"), commit())


@dataclass(frozen=True)
class Cost:
    """What one call executes, and the cycles that a model makes of it: exact and repeatable, and no time."""

    instructions: int
    cycles: float


@dataclass(frozen=True)
class Timing:
    """One candidate in one batch. seconds: all calls; speedups: the default's median / its own, by round.

    A model gives `cost` and no seconds; its one speedup is the default's cycles / its own.
    """

    seconds: list[float]
    speedups: list[float]
    failure: str | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class Batch:
    """What was measured together: a timing for every candidate, the default's, the reader's GB/s by round.

    foreign: share of the processors' time that other processes took. spins: seconds of the canary that counts clock
    cycles; throttled: the firmware held the clock down. Both come from boards alone. page_kib: of the weights' memory,
    None where the device does not tell.
    """

    timings: list[Timing]
    default: Timing
    reads: list[float]
    rotated_bytes: int
    bytes_per_call: float
    foreign: float = 0.0
    spins: tuple[float, ...] = ()
    throttled: bool = False
    page_kib: int | None = None


class Measurer(Protocol):
    """A device that times candidates."""

    setting: Setting

    def measure(self, request: Request, space: Space, candidates: Sequence[Knobs], rounds: int) -> Batch:
        """Failures are part of the batch. Raises NoisyError when no batch was quiet, DeviceLost without a device."""

    def close(self) -> None:
        """Let go of the device."""


def drift(values: Sequence[float]) -> float:
    """Distance of the quartiles as a share of the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


@dataclass
class WorkerMeasurer:
    """A device behind a worker process.

    losses: how often a worker may be lost over the same candidate before that is its failure. cancelled: True ends
    whatever is being waited for, with DeviceLost.
    """

    setting: Setting
    reply_s: float = REPLY_S
    most_drift: float = DRIFT
    cancelled: Callable[[], bool] = lambda: False
    _process: subprocess.Popen[bytes] | None = None
    _connection: Connection | None = None
    _opened: Request | None = None
    _size: dict[str, Any] = field(default_factory=dict)
    _quickest_s: float = math.inf  # the default's best median since the workload was opened

    worker: ClassVar[str]
    losses: ClassVar[int] = 1
    repeats: ClassVar[int] = REPEATS

    def start(self) -> None:
        """Start the worker, which loads TVM for some seconds; `measure` does it too."""
        if self._process is None:
            ours, its = Pipe()
            environment = {**os.environ, **self._environment()}
            paths = [str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
            command = [sys.executable, "-m", self.worker, str(its.fileno()), *self._arguments()]
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
        """See Measurer. When the worker is lost while it times several, each of them is timed alone."""
        why: Exception
        for _ in range(self.losses):
            try:
                return self._measure(request, space, candidates, rounds)
            except CandidateLost as error:  # noqa: PERF203
                why = error
        if len(candidates) > 1:
            alone = [self.measure(request, space, [knobs], rounds) for knobs in candidates]
            return replace(alone[-1], timings=[batch.timings[0] for batch in alone])
        try:
            default = self._measure(request, space, [], rounds)
        except CandidateLost as error:
            raise DeviceLost(str(error)) from None
        if not candidates:
            return default
        return replace(default, timings=[Timing([], [], str(why))])

    def _measure(self, request: Request, space: Space, candidates: Sequence[Knobs], rounds: int) -> Batch:
        numbers, failures = self._prepare(request, space, candidates)
        within = self._time_s(len(numbers), rounds)
        why: str | None = "nothing was timed"
        for repeat in range(self.repeats):
            if repeat == 0 or self._rested(repeat):
                answer = self._ask("time", [0, *numbers.values()], rounds, within=within)
                batch = self._batch(answer, list(numbers), failures, len(candidates))
                why = self._unfit(batch)
                if why is None:
                    return batch
        raise NoisyError(why)

    def _environment(self) -> dict[str, str]:
        return {"TVM_NUM_THREADS": str(self.setting.threads)}

    def _arguments(self) -> list[str]:
        return []

    def _time_s(self, count: int, rounds: int) -> float:
        """How long the worker may time that many candidates."""
        return self.reply_s

    def _rested(self, repeat: int) -> bool:
        """Pause before another attempt; False when it would be in vain."""
        time.sleep(PAUSE_S * 2 ** (repeat - 1))
        return True

    def _unfit(self, batch: Batch) -> str | None:
        """Why a batch must be thrown away."""
        worst = self._drift(batch)
        if worst <= self.most_drift and batch.foreign <= self._most_foreign():
            return None
        return (
            f"other processes take {batch.foreign:.0%} of the processors, and the speed of one kernel drifts by "
            f"{worst:.0%} ({self.most_drift:.0%} is the limit)"
        )

    def _processors(self) -> int:
        return os.cpu_count() or 1

    def _most_foreign(self) -> float:
        """Processors that our threads leave idle are for everyone; of ours, as much more as drift is allowed."""
        unused = max(0.0, 1 - self.setting.threads / self._processors())
        return unused + FOREIGN * self.most_drift / DRIFT

    def _drift(self, batch: Batch) -> float:
        """The worst of: the reader in this batch, the default kernel in it, the default against its best batch."""
        median = statistics.median(batch.default.seconds)
        self._quickest_s = min(self._quickest_s, median)
        return max(drift(batch.reads), drift(batch.default.speedups), median / self._quickest_s - 1)

    def _prepare(
        self, request: Request, space: Space, candidates: Sequence[Knobs]
    ) -> tuple[dict[int, int], dict[int, str]]:
        """Worker's number, or failure, of every candidate by its place. Those that a lost worker had are made again.

        Where one loss proves nothing, the default comes once more before a candidate's second chance: a device that is
        lost over that is no device.
        """
        failures: dict[int, str] = {}
        lost: Counter[int] = Counter()
        while True:
            numbers: dict[int, int] = {}
            try:
                self._open(request, space)
                if lost:
                    self._control(space)
                for place, knobs in enumerate(candidates):
                    if place not in failures:
                        try:
                            numbers[place] = self._ask("prepare", knobs)
                        except CandidateFailed as error:
                            failures[place] = str(error)
                return numbers, failures
            except CandidateLost as error:
                place = next(p for p in range(len(candidates)) if p not in numbers and p not in failures)
                lost[place] += 1
                if lost[place] >= self.losses:
                    failures[place] = str(error)

    def _control(self, space: Space) -> None:
        """Raise DeviceLost unless the default can be prepared like a candidate."""
        if self.losses == 1:
            return
        try:
            self._ask("prepare", dict(space.default))
        except (CandidateLost, CandidateFailed) as error:
            raise DeviceLost(f"it fails with the default kernel, too: {error}") from None

    def _open(self, request: Request, space: Space) -> None:
        """Have the worker take up a workload, unless it has it in hand from the batch before."""
        raise NotImplementedError

    def _ask(self, *message: Any, within: float | None = None) -> Any:
        assert self._connection is not None
        seconds = self.reply_s if within is None else within
        try:
            self._connection.send(message)
            if not any(self._answered() for _ in range(math.ceil(seconds / STEP_S))):
                raise CandidateLost(f"no answer within {seconds:g} s")
            status, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.wait()  # type: ignore[union-attr]
            code = self._process.returncode  # type: ignore[union-attr]
            self.close()
            raise CandidateLost(f"the process ended with {code}") from None
        except (CandidateLost, DeviceLost):
            self.close()
            raise
        if status == "failed":
            raise CandidateFailed(value)
        if status == "lost":
            self._opened = None
            raise CandidateLost(value)
        if status == "none":
            raise DeviceLost(value)
        return value

    def _answered(self) -> bool:
        assert self._connection is not None
        if self.cancelled():
            raise DeviceLost("it is not needed any more")
        return self._connection.poll(STEP_S)

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
        return Batch(
            timings, default, answer["reads"], int(self._size["rotated_bytes"]), self._size["bytes_per_call"],
            answer["foreign"], tuple(answer["spins"]), bool(answer.get("throttled")),
            self._size["page_kib"],
        )  # fmt: skip


def commit() -> str:
    """The tree's commit, with a + when the code that makes kernels has changes; "unknown" outside of a repository."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        code = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "compiler", "schedules", "targets"], check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if code.returncode else "")
