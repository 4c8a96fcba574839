"""The search with a device that answers by formula: what it finds, repeats, records and refuses to believe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from compiler.tune import search
from compiler.tune.measure import Batch, NoisyError, Setting, Timing, drift
from compiler.tune.records import Database, frozen
from compiler.tune.search import Task, Tuner, propose
from schedules.kernel import Request, Space
from tests.tune.test_records import linear

SETTING = Setting(2, "stone", "0.27.0.post1", "abc")
SMALL = Space.around({"rows": 2}, {"rows": (1, 2, 4, 8)}, schedule="mill.stone", workload={"m": 1, "n": 8}, macs=256)
WIDE = {name: tuple(range(8)) for name in "abcd"}
LARGE = Space.around(dict.fromkeys("abcd", 0), WIDE, schedule="mill.stone", workload={"m": 1, "n": 9})


@dataclass
class Formula:
    """seconds(knobs) of a call, None for a candidate that fails; every second round is slower by `noise`."""

    seconds: Any
    noise: float = 0.0
    setting: Setting = SETTING
    asked: list[Mapping[str, int]] = field(default_factory=list)
    die_after: int = 99

    def measure(self, request: Request, space: Space, candidates: Sequence[Mapping[str, int]], rounds: int) -> Batch:
        if len(self.asked) >= self.die_after:
            raise NoisyError("too loud")
        base = self.seconds(space.default)
        found = []
        for knobs in candidates:
            seconds = self.seconds(knobs)
            if rounds == search.ROUNDS:
                self.asked.append(knobs)
            times = [(seconds or 0) * (1 + self.noise * (i % 2)) for i in range(rounds)]
            found.append(Timing([], [], "it burst") if seconds is None else Timing(times, [base / t for t in times]))
        return Batch(found, Timing([base] * rounds, [1.0] * rounds), [20.0] * rounds, 1000, 100.0)

    def close(self) -> None:
        """Nothing."""


def tune(folder: Path, space: Space, device: Formula, trials: int = 100) -> search.Outcome:
    database = Database.writing(folder, "mill")
    try:
        return Tuner(database, device, trials).tune(Task(linear(32), space))
    finally:
        database.close()


def test_a_small_space_is_measured_whole_and_the_best_point_wins(tmp_path: Path) -> None:
    outcome = tune(tmp_path, SMALL, Formula(lambda knobs: 1 / knobs["rows"]))
    assert (outcome.trials, outcome.new, outcome.failed, outcome.points) == (3, 3, 0, 3)
    choice = outcome.choice
    assert choice is not None
    assert (choice["knobs"], choice["gained"], choice["wins"], choice["rounds"]) == ({"rows": 8}, True, 16, 16)
    assert choice["speedup"] == {"median": 4.0, "min": 4.0, "max": 4.0}
    assert (choice["gb_s"], choice["gmac_s"], choice["read_gb_s"]) == (8e-7, 2.048e-6, 20.0)  # 100 B, 256 in 1/8 s


@pytest.mark.parametrize(("gain", "noise", "believed"), [(1.01, 0, False), (1.05, 0, True), (1.2, 0.4, False)])
def test_a_gain_inside_the_noise_keeps_the_default(tmp_path: Path, gain: float, noise: float, believed: bool) -> None:
    device = Formula(lambda knobs: 1 / gain if knobs["rows"] == 8 else 1.0, noise)
    choice = tune(tmp_path, SMALL, device).choice
    assert choice is not None
    assert choice["gained"] is believed
    assert choice["best"] == {"rows": 8}
    assert choice["knobs"] == ({"rows": 8} if believed else {"rows": 2})
    assert (Database.read(tmp_path, "mill").decision(SMALL, 2) is not None) is believed


def test_failures_are_recorded_as_failures(tmp_path: Path) -> None:
    outcome = tune(tmp_path, SMALL, Formula(lambda knobs: None if knobs["rows"] == 8 else 1 / knobs["rows"]))
    assert (outcome.trials, outcome.failed) == (3, 1)
    (failure,) = [r for r in Database.read(tmp_path, "mill").records if r["kind"] == "failure"]
    assert (failure["knobs"], failure["error"]) == ({"rows": 8}, "it burst")
    assert "seconds" not in failure
    assert outcome.choice is not None and outcome.choice["knobs"] == {"rows": 4}


def test_only_failures_are_no_choice(tmp_path: Path) -> None:
    outcome = tune(tmp_path, SMALL, Formula(lambda knobs: 1.0 if knobs["rows"] == 2 else None))
    assert (outcome.failed, outcome.choice) == (3, None)


def test_nothing_is_measured_twice(tmp_path: Path) -> None:
    device = Formula(lambda knobs: 1 + sum(knobs.values()), die_after=16)
    stopped = tune(tmp_path, LARGE, device, trials=24)
    assert (stopped.trials, stopped.choice, stopped.noise) == (16, None, "too loud")
    device.die_after = 99
    outcome = tune(tmp_path, LARGE, device, trials=24)
    assert (outcome.trials, outcome.new, outcome.noise) == (24, 8, None)
    assert len({frozen(knobs) for knobs in device.asked}) == len(device.asked) == 24
    before = (tmp_path / "mill" / "tune.jsonl").read_bytes()
    assert tune(tmp_path, LARGE, device, trials=24).new == 0
    assert (tmp_path / "mill" / "tune.jsonl").read_bytes() == before


def test_the_cost_model_leads_to_the_valley(tmp_path: Path) -> None:
    """4095 points and one valley: 80 trials end nearer to it than chance (80 of 4095, whose best is about 0.02 off)."""
    device = Formula(lambda knobs: 1 + sum((knobs[name] - 5) ** 2 for name in "abcd"))
    outcome = tune(tmp_path, LARGE, device, trials=80)
    assert outcome.choice is not None
    assert sum(abs(v - 5) for v in outcome.choice["knobs"].values()) <= 1


def test_the_first_batch_looks_around_the_default() -> None:
    first = propose(LARGE, {}, 8)
    changed = [sum(point[name] != 0 for name in "abcd") for point in first]
    assert changed[:4] == [1, 1, 1, 1]
    assert len({frozen(point) for point in first}) == 8
    assert propose(LARGE, {}, 8) == first


def test_what_was_best_for_a_sibling_comes_first(tmp_path: Path) -> None:
    tune(tmp_path, LARGE, Formula(lambda knobs: 1 + abs(knobs["a"] - 3)), trials=32)
    database = Database.read(tmp_path, "mill")
    sibling = Space.around(dict.fromkeys("abcd", 0), WIDE, schedule="mill.stone", workload={"m": 1, "n": 10})
    hints = search.siblings_best(database, sibling)
    assert hints[0]["a"] == 3
    assert propose(sibling, {}, 8, hints)[:6] == hints[:6]
    prompt = Space.around(dict.fromkeys("abcd", 0), WIDE, schedule="mill.stone", workload={"m": 16, "n": 9})
    assert search.siblings_best(database, prompt) == search.siblings_best(database, LARGE) == []


def test_senseless_points_are_no_points() -> None:
    space = Space.around({"a": 1, "b": 1}, {"a": (1, 2), "b": (1, 2)}, schedule="s", workload={},
                         allowed=lambda knobs: knobs["a"] >= knobs["b"])  # fmt: skip
    assert list(space.points()) == [{"a": 2, "b": 1}, {"a": 2, "b": 2}]


def test_drift_by_hand() -> None:  # quartiles of 1..5 are 2 and 4, the median is 3
    assert drift([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)
    assert drift([7]) == drift([3, 3, 3]) == 0


def test_the_time_budget() -> None:
    assert not search.until(None)()
    assert search.until(0)()
    assert not search.until(math.inf)()
