"""Runs and prints `bench --growth`: round by round through all points, then a table and a record for each."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compiler.errors import UserError
from compiler.measure import compare, growth, shapes, speed_report
from compiler.measure.compare import Row, Runs
from compiler.measure.engines import Engines
from compiler.measure.growth import Point, Setup
from compiler.measure.shape_bundle import built
from targets import Target


@dataclass
class Growth:
    """The points of one kind of growth, and the engines that are measured at each.

    left_out: for every point the engines that cannot run it; they are not tried again there.
    stopped: where an exception ended it, once something had been measured.
    """

    kind: str
    todo: Sequence[tuple[Any, Setup]]
    engines: Engines
    points: list[Point] = field(default_factory=list)
    left_out: list[dict[str, UserError]] = field(init=False)
    stopped: Stopped | None = None

    def __post_init__(self) -> None:
        self.left_out = [{} for _ in self.todo]

    def run(self, target: Target, threads: Sequence[int | None]) -> Iterator[tuple[Any, Setup, list[Row]]]:
        """Value, setup and rows of every point, one number of threads after the other.

        Whatever ends it, an interrupt or a process that died: what was measured comes first, in as many rounds as
        there were, and then the exception.
        """
        with ExitStack() as stack:
            models = growth.shared([setup for _, setup in self.todo])
            places: dict[Setup, Path] = {}
            for model in dict.fromkeys(models):
                _say(f"building {model.shape}, {model.bits} bits, groups of {model.group_size}")
                places[model] = stack.enter_context(built(model, target, quiet=True))
            for i, count in enumerate(threads):
                found: list[list[list[Runs]]] = [[] for _ in self.todo]
                try:
                    self._rounds(models, places, count, found)
                except BaseException:
                    rounds = self.todo[0][1].work.rounds
                    if (i or found[0]) and (whole := min(map(len, found))) < rounds:
                        self.stopped = Stopped(whole, rounds, threads[i:])
                    yield from self._rows(found)
                    raise
                yield from self._rows(found)

    def _rows(self, found: Sequence[Sequence[Sequence[Runs]]]) -> Iterator[tuple[Any, Setup, list[Row]]]:
        """Of the points that were measured at all."""
        for (value, setup), runs in zip(self.todo, found, strict=True):
            if runs:
                rows = compare.rows(compare.joined(runs))
                at = shapes.parameters(setup.shape) if self.kind == "size" else value
                self.points += [Point(value, at, row) for row in rows]
                yield value, replace(setup, work=replace(setup.work, rounds=len(runs))), rows

    def _rounds(
        self, models: Sequence[Setup], places: Mapping[Setup, Path], threads: int | None, found: list[list[list[Runs]]]
    ) -> None:
        """Add to `found` what the engines of each point do, round by round.

        Only one point's processes exist at a time: on a machine the first one binds its threads. Its first run does
        not count, for it brings the weights into memory.
        """
        count = self.todo[0][1].work.rounds
        for turn in range(count):
            for i, ((value, setup), model) in enumerate(zip(self.todo, models, strict=True)):
                _say(f"round {turn + 1} of {count}: {self.kind} {value}")
                with ExitStack() as stack:
                    known = set(self.left_out[i])
                    sides = self.engines.opened(stack, places[model], model, threads, self.left_out[i])
                    for name in self.left_out[i].keys() - known:  # the other points and engines are worth having
                        _say(f"left out at {self.kind} {value}: {self.left_out[i][name]}")
                    compare.runs(sides, replace(setup.work, rounds=1))
                    found[i].append(compare.runs(sides, replace(setup.work, rounds=1)))


@dataclass(frozen=True)
class Stopped:
    """Rounds that all points have, of how many; the number of threads that they were made with, and those to come."""

    whole: int
    count: int
    threads: Sequence[int | None]

    def told(self, where: str) -> str:
        """A line for people: what is kept, and how to go on."""
        more = f" --rounds {self.count - self.whole}"
        if self.threads != [None]:
            more += f" --threads {self.threads[0]}"
        then = f", then with --threads {','.join(map(str, self.threads[1:]))}" if self.threads[1:] else ""
        return (
            f"stopped in round {self.whole + 1} of {self.count}: what was measured is kept {where}. To go on: the same "
            f"command with{more}{then}"
        )


def show(kind: str, value: Any, setup: Setup, rows: Sequence[Row]) -> None:
    """Print a point."""
    print(f"{kind} {value}")  # noqa: T201
    speed_report.beside(rows, setup.work, [None] * len(rows))


def _say(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201
