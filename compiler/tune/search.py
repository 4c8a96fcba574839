"""The search for one workload: every point where the space is small, XGBoost's next guess where it is large.

Points are knobs by name. Batches of candidates are timed beside the default; at the end the best few meet the default
once more, for longer, and only a gain that stands out of the noise there becomes a choice.
"""

from __future__ import annotations

import random
import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compiler.errors import UserError
from compiler.tune.measure import Batch, Measurer, NoisyError, Timing
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


class Tuner:
    """Tasks on one device into one database. `stop()` True ends a task between two batches."""

    def __init__(
        self,
        database: Database,
        measurer: Measurer,
        trials: int,
        stop: Callable[[], bool] = lambda: False,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.database, self.measurer, self.trials, self.stop, self.advance = database, measurer, trials, stop, advance

    def wanted(self, task: Task) -> int:
        """How many trials there will be in all."""
        return min(self.trials, sum(1 for _ in task.space.points()))

    def tune(self, task: Task) -> Outcome:
        """Measure what is still missing, then decide; a task that is complete costs nothing."""
        threads, wanted, noise = self.measurer.setting.threads, self.wanted(task), None
        done = before = self.database.trials(task.space, threads)
        try:
            while len(done) < wanted and not self.stop():
                hints = siblings_best(self.database, task.space)
                self._batch(task, propose(task.space, done, min(BATCH, wanted - len(done)), hints))
                done = self.database.trials(task.space, threads)
            choice = self.database.choice(task.space, threads)
            behind = bool(done) and (choice is None or choice["trials"] < len(done))
            if behind and (len(done) > len(before) or not self.stop()):
                self._decide(task, done)
        except NoisyError as error:
            noise = str(error)
        failed = sum(record["kind"] == "failure" for record in done.values())
        points, choice = sum(1 for _ in task.space.points()), self.database.choice(task.space, threads)
        return Outcome(task, len(done), len(done) - len(before), failed, points, choice, noise)

    def _batch(self, task: Task, candidates: list[dict[str, int]]) -> None:
        batch = self.measurer.measure(task.request, task.space, candidates, ROUNDS)
        for knobs, timing in zip(candidates, batch.timings, strict=True):
            if timing.failure is not None:
                self.database.append(self._record(task, "failure", knobs) | {"error": timing.failure})
            else:
                figures = {"runs": len(timing.seconds), "speedup": spread(timing.speedups)}
                self.database.append(self._record(task, "trial", knobs) | _figures(task, batch, timing) | figures)
            self.advance(1)

    def _decide(self, task: Task, done: Results) -> None:
        """The finalists against the default; no verdict when every trial failed."""
        ranked = sorted(
            (r for r in done.values() if r["kind"] == "trial"), key=lambda r: r["speedup"]["median"], reverse=True
        )
        if not ranked:
            return
        finalists = [dict(record["knobs"]) for record in ranked[:FINALISTS]]
        batch = self.measurer.measure(task.request, task.space, finalists, FINAL_ROUNDS)
        finished = [(k, t) for k, t in zip(finalists, batch.timings, strict=True) if t.failure is None]
        if not finished:
            return
        best, timing = max(finished, key=lambda pair: statistics.median(pair[1].speedups))
        wins = sum(speedup > 1 for speedup in timing.speedups)
        gained = statistics.median(timing.speedups) >= MIN_GAIN and wins >= MIN_WINS * len(timing.speedups)
        record = self._record(task, "choice", best if gained else task.space.default)
        record |= {"best": best, "gained": gained, "default_seconds": spread(batch.default.seconds)}
        record |= {"wins": wins, "rounds": len(timing.speedups), "trials": len(done)}
        record |= _figures(task, batch, timing) | {"speedup": spread(timing.speedups)}
        self.database.append(record)

    def _record(self, task: Task, kind: str, knobs: Knobs) -> Record:
        space = task.space
        about = {"schedule": space.schedule, "operator": task.request.op, "workload": dict(space.workload)}
        return {"kind": kind, **about, "knobs": dict(knobs), "default": dict(space.default)} | asdict(
            self.measurer.setting
        )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": _short(statistics.median(values)), "min": _short(min(values)), "max": _short(max(values))}


def _figures(task: Task, batch: Batch, timing: Timing) -> dict[str, Any]:
    median = statistics.median(timing.seconds)
    return {
        "seconds": spread(timing.seconds),
        "gb_s": _short(batch.bytes_per_call / median / 1e9),
        "gmac_s": _short(task.space.macs / median / 1e9),
        "read_gb_s": _short(statistics.median(batch.reads)),
        "rotated_bytes": batch.rotated_bytes,
    }


def _short(value: float) -> float:
    """Four digits: more than was measured."""
    return float(f"{value:.4g}")


def until(seconds: float | None) -> Callable[[], bool]:
    """True once that many seconds have passed; None: never."""
    end = None if seconds is None else time.monotonic() + seconds
    return lambda: end is not None and time.monotonic() >= end
