"""The search for one workload: every point where the space is small, XGBoost's next guess where it is large.

Points are knobs by name. Batches of candidates are timed beside the default; at the end the best few meet the default
once more, for longer, and only a gain that stands out of the noise there becomes a choice.
"""

from __future__ import annotations

import math
import random
import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from compiler.errors import UserError
from compiler.tune.measure import Batch, DeviceLost, Measurer, NoisyError, Setting, Timing
from compiler.tune.records import Database, Record, frozen
from schedules.kernel import Request, Space

BATCH, ROUNDS = 8, 5
FINALISTS, FINAL_ROUNDS = 3, 16
MIN_GAIN = 1.02  # a smaller one is not worth another kernel
MIN_WINS = 0.8  # of the rounds: 13 of 16 by chance once in a hundred, and one of three finalists once in thirty
GUIDED_FROM = 16  # trials before the cost model has anything to say
EXPLORE = 0.25  # of a guided batch, at random: the model's blind spots

Knobs = Mapping[str, int]
Results = Mapping[tuple[tuple[str, int], ...], Record]


@dataclass(frozen=True)
class Task:
    """A call whose schedule has something to choose."""

    request: Request
    space: Space

    @property
    def name(self) -> str:
        """For people: schedule and workload."""
        return f"{self.space.schedule} " + " ".join(f"{k}={v}" for k, v in self.space.workload.items())


@dataclass(frozen=True)
class Outcome:
    """How a task ended. trials: recorded in all; new: by this run; choice: the verdict, None while there is none.

    noise: why the task was left, when the machine was too busy for it; a later run goes on with it.
    """

    task: Task
    trials: int
    new: int
    failed: int
    points: int
    choice: Record | None
    noise: str | None = None


def propose(space: Space, done: Results, count: int, hints: Sequence[Knobs] = ()) -> list[dict[str, int]]:
    """The next `count` points that nobody has tried, fewer when none are left.

    First hints, then the neighbours of the default, one knob away, and random points; then the guesses of the model.
    """
    points = list(space.points())
    seed = zlib.crc32(repr((space.schedule, sorted(space.workload.items()))).encode())
    random.Random(seed).shuffle(points)  # noqa: S311
    left = [point for point in points if frozen(point) not in done]
    measured = [record for record in done.values() if record["kind"] == "trial"]
    if len(left) <= count:
        return left
    if len(measured) >= GUIDED_FROM:
        ranked = by_model(space, measured, left)
        explored = min(round(EXPLORE * count), count)
        chosen = ranked[: count - explored]
        return chosen + [point for point in left if point not in chosen][:explored]
    near = [point for point in left if sum(point[k] != v for k, v in space.default.items()) == 1]
    chosen = [point for hint in hints for point in left if point == hint][: count - count // 4]
    chosen += [point for point in near if point not in chosen][: max(0, count - count // 2 - len(chosen))]
    return chosen + [point for point in left if point not in chosen][: count - len(chosen)]


def siblings_best(database: Database, space: Space) -> list[dict[str, int]]:
    """What was fastest for other workloads of this schedule with as many tokens a call, the best first."""
    found: dict[tuple[tuple[str, int], ...], list[float]] = {}
    for record in database.records:
        kin = record["schedule"] == space.schedule and record["workload"].get("m") == space.workload.get("m")
        if record["kind"] == "trial" and kin and record["workload"] != dict(space.workload):
            found.setdefault(frozen(record["knobs"]), []).append(record["speedup"]["median"])
    ranked = sorted(found, key=lambda knobs: statistics.fmean(found[knobs]), reverse=True)
    return [dict(knobs) for knobs in ranked]


def by_model(space: Space, measured: Sequence[Record], points: list[dict[str, int]]) -> list[dict[str, int]]:
    """Points by what XGBoost expects of them, best first. It learns log(speedup) from the logarithms of the knobs."""
    try:
        import xgboost
    except ImportError as error:
        raise UserError(
            "Tuning a large space needs xgboost, which is not installed. Install it: pip install 'quern[tune]'."
        ) from error
    x = np.log2(1 + np.array([[record["knobs"][name] for name in space.choices] for record in measured], np.float64))
    y = np.log([record["speedup"]["median"] for record in measured])
    settings = {"max_depth": 4, "eta": 0.2, "nthread": 1, "seed": 0, "objective": "reg:squarederror"}
    model = xgboost.train(settings, xgboost.DMatrix(x, y), num_boost_round=60)
    asked = np.log2(1 + np.array([[point[name] for name in space.choices] for point in points], np.float64))
    expected = model.predict(xgboost.DMatrix(asked))
    return [points[i] for i in np.argsort(-expected, kind="stable")]


@dataclass
class Progress:
    """A task on its way. new: trials of this run; asked: points that are being measured now; noise: why it was left."""

    task: Task
    new: int = 0
    asked: set[tuple[tuple[str, int], ...]] = field(default_factory=set)
    decided: bool = False
    noise: str | None = None


@dataclass(frozen=True)
class Job:
    """Candidates to be measured beside each other; verdict: they are the finalists."""

    progress: Progress
    candidates: list[dict[str, int]]
    rounds: int
    verdict: bool = False


class Tuner:
    """Tasks into one database. `stop()` True ends a task between two batches.

    `tune` takes one device through one task. Several devices share tasks through `next` and `finish` (fleet.py): a
    batch holds no more than a device's share of what is left.
    """

    def __init__(
        self,
        database: Database,
        measurer: Measurer,
        trials: int,
        stop: Callable[[], bool] = lambda: False,
        advance: Callable[[int], None] = lambda count: None,
        devices: int = 1,
    ) -> None:
        self.database, self.measurer, self.trials, self.stop, self.advance = database, measurer, trials, stop, advance
        self.devices = devices

    def wanted(self, task: Task) -> int:
        """How many trials there will be in all."""
        return min(self.trials, sum(1 for _ in task.space.points()))

    def tune(self, task: Task) -> Outcome:
        """Measure what is still missing, then decide; a task that is complete costs nothing."""
        progress = self.begin(task)
        try:
            while (job := self.next(progress)) is not None:
                batch = self.measurer.measure(task.request, task.space, job.candidates, job.rounds)
                self.finish(job, batch, self.measurer.setting)
        except (NoisyError, DeviceLost) as error:
            progress.noise = str(error)
        return self.outcome(progress)

    def begin(self, task: Task) -> Progress:
        """A task of which nothing was measured in this run."""
        return Progress(task)

    def next(self, progress: Progress) -> Job | None:
        """What to measure next; None when nothing is left, or when others still measure what it depends on."""
        task, done = progress.task, self._done(progress.task)
        left = self.wanted(task) - len(done) - len(progress.asked)
        if left > 0 and not self.stop():
            taken = done | {point: {"kind": "asked"} for point in progress.asked}
            count = min(BATCH, math.ceil(left / self.devices))
            candidates = propose(task.space, taken, count, siblings_best(self.database, task.space))
            progress.asked |= {frozen(knobs) for knobs in candidates}
            if candidates:
                return Job(progress, candidates, ROUNDS)
        if progress.asked or progress.decided or not self.undecided(task):
            return None
        if not progress.new and self.stop():
            return None
        progress.decided = True
        return Job(progress, _finalists(done), FINAL_ROUNDS, verdict=True)

    def undecided(self, task: Task) -> bool:
        """Whether trials are recorded that no verdict knows of."""
        done, choice = self._done(task), self.database.choice(task.space, self.measurer.setting.threads)
        return bool(_finalists(done)) and (choice is None or choice["trials"] < len(done))

    def complete(self, task: Task) -> bool:
        """Whether nothing is left to measure and to decide."""
        return len(self._done(task)) >= self.wanted(task) and not self.undecided(task)

    def give_back(self, job: Job) -> None:
        """Nothing came of a job: somebody else may have it."""
        job.progress.asked -= {frozen(knobs) for knobs in job.candidates}
        if job.verdict:
            job.progress.decided = False

    def finish(self, job: Job, batch: Batch, setting: Setting) -> None:
        """Record what a device measured."""
        if job.verdict:
            self._decide(job, batch, setting)
            return
        task = job.progress.task
        for knobs, timing in zip(job.candidates, batch.timings, strict=True):
            if timing.failure is not None:
                self.database.append(_record(task, "failure", knobs, setting) | {"error": timing.failure})
            else:
                runs = {"runs": len(timing.seconds)} if timing.cost is None else {}
                figures = _figures(task, batch, timing) | {"speedup": spread(timing.speedups)} | runs
                self.database.append(_record(task, "trial", knobs, setting) | figures)
            job.progress.new += 1
            self.advance(1)
        self.give_back(job)

    def outcome(self, progress: Progress) -> Outcome:
        """How far a task came."""
        task, done = progress.task, self._done(progress.task)
        failed = sum(record["kind"] == "failure" for record in done.values())
        points = sum(1 for _ in task.space.points())
        choice = self.database.choice(task.space, self.measurer.setting.threads)
        return Outcome(task, len(done), progress.new, failed, points, choice, progress.noise)

    def _done(self, task: Task) -> dict[tuple[tuple[str, int], ...], Record]:
        return self.database.trials(task.space, self.measurer.setting.threads)

    def _decide(self, job: Job, batch: Batch, setting: Setting) -> None:
        """The finalists against the default; no verdict when all of them failed."""
        task = job.progress.task
        finished = [(k, t) for k, t in zip(job.candidates, batch.timings, strict=True) if t.failure is None]
        if not finished:
            return
        best, timing = max(finished, key=lambda pair: statistics.median(pair[1].speedups))
        wins = sum(speedup > 1 for speedup in timing.speedups)
        gained = statistics.median(timing.speedups) >= MIN_GAIN and wins >= MIN_WINS * len(timing.speedups)
        record = _record(task, "choice", best if gained else task.space.default, setting)
        record |= {"best": best, "gained": gained, "trials": len(self._done(task))}
        if batch.default.cost is None:
            record |= {"default_seconds": spread(batch.default.seconds), "wins": wins, "rounds": len(timing.speedups)}
        else:
            record |= {f"default_{name}": figure for name, figure in asdict(batch.default.cost).items()}
        record |= _figures(task, batch, timing) | {"speedup": spread(timing.speedups)}
        self.database.append(record)


def _finalists(done: Results) -> list[dict[str, int]]:
    """The best trials; none when every trial failed."""
    measured = (record for record in done.values() if record["kind"] == "trial")
    ranked = sorted(measured, key=lambda r: r["speedup"]["median"], reverse=True)
    return [dict(record["knobs"]) for record in ranked[:FINALISTS]]


def _record(task: Task, kind: str, knobs: Knobs, setting: Setting) -> Record:
    space = task.space
    about = {"schedule": space.schedule, "operator": task.request.op, "workload": dict(space.workload)}
    made_by = {name: value for name, value in asdict(setting).items() if value is not None}  # a CPU's has no GPU
    return {"kind": kind, **about, "knobs": dict(knobs), "default": dict(space.default)} | made_by


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": _short(statistics.median(values)), "min": _short(min(values)), "max": _short(max(values))}


def _figures(task: Task, batch: Batch, timing: Timing) -> dict[str, Any]:
    if timing.cost is not None:
        return asdict(timing.cost)
    median = statistics.median(timing.seconds)
    return {
        "seconds": spread(timing.seconds),
        "gb_s": _short(batch.bytes_per_call / median / 1e9),
        "gmac_s": _short(task.space.macs / median / 1e9),
        "read_gb_s": _short(statistics.median(batch.reads)),
        "rotated_bytes": batch.rotated_bytes,
        **({} if batch.page_kib is None else {"page_kib": batch.page_kib}),
    }


def _short(value: float) -> float:
    """Four digits: more than was measured."""
    return float(f"{value:.4g}")


def until(seconds: float | None) -> Callable[[], bool]:
    """True once that many seconds have passed; None: never."""
    end = None if seconds is None else time.monotonic() + seconds
    return lambda: end is not None and time.monotonic() >= end
