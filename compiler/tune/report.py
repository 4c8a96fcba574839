"""What `tune` shows: a bar while it measures, and the verdicts at the end, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column

from compiler.tune.search import MIN_GAIN, Outcome, Task, Tuner
from targets import Target


@contextmanager
def bar(quiet: bool) -> Iterator[Progress | None]:
    """A bar on the terminal while something runs; None where there is no terminal, or where it shall be quiet."""
    console = Console(file=sys.stderr, highlight=False)
    if quiet or not console.is_terminal:
        yield None
        return
    # What counts comes first: where the terminal is narrow, names of shapes are cut, and no number.
    name = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    columns = (SpinnerColumn(), BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn(), name)
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        yield progress


def shown(tuner: Tuner, tasks: list[Task], quiet: bool) -> Iterator[Task]:
    """The tasks one by one, with a bar of all trials and the name of the one at hand; without a screen, lines."""
    total = sum(tuner.wanted(task) for task in tasks)
    with bar(quiet) as progress:
        row = TaskID(0) if progress is None else progress.add_task("", total=total)
        before = 0
        for i, task in enumerate(tasks, 1):
            if progress is not None:
                done = len(tuner.database.trials(task.space, tuner.measurer.setting.threads))
                tuner.advance = partial(progress.advance, row)
                progress.update(row, description=f"{i}/{len(tasks)} {task.name}", completed=before + done)
                before += tuner.wanted(task)
            elif not quiet:
                print(f"{i}/{len(tasks)} {task.name}", file=sys.stderr)  # noqa: T201
            yield task


def summary(
    options: argparse.Namespace, target: Target, threads: int, path: Path, outcomes: list[Outcome], asked: int
) -> None:
    """Print what was found for `asked` shapes, two lines each, or as one JSON object."""
    gained = [o for o in outcomes if o.choice is not None and o.choice["gained"]]
    complete = [o for o in outcomes if o.choice is not None and o.trials >= min(options.trials, o.points)]
    if options.json:
        record = {"target": target.name, "key": target.tuning_key, "database": str(path), "threads": threads}
        record |= {"cost": options.cost, "gained": len(gained), "complete": len(complete) == asked}
        print(json.dumps(record | {"shapes": [_as_json(outcome) for outcome in outcomes]}))  # noqa: T201
        return
    modelled = options.cost == "model"
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for outcome in outcomes:
        console.print(f"{outcome.task.name}\n  {_verdict(outcome)}")
    if noisy := [o for o in outcomes if o.noise is not None]:
        left = "1 shape was" if len(noisy) == 1 else f"{len(noisy)} shapes were"
        console.print(
            f"{left} left: {noisy[-1].noise}. Nothing of such batches is recorded. Mend that and run "
            f"the same command again: it goes on where it stopped."
        )
    kept = len(complete) - sum(o in gained for o in complete)
    rest, new = f"{asked - len(complete)} are not complete.", f"{sum(o.new for o in outcomes)} new trials."
    if modelled:
        console.print(
            f"{path}: {len(gained)} of {asked} shapes gained, {kept} keep the default because nothing beat it by "
            f"{MIN_GAIN - 1:.0%}, {rest} Cycles of a model, not times: nothing was measured. {new}"
        )
        return
    console.print(
        f"{path}: {len(gained)} of {asked} shapes gained, {kept} keep the default because nothing beat it beyond the "
        f"noise, {rest} {threads} threads, {new}"
    )


def _as_json(outcome: Outcome) -> dict[str, Any]:
    space, choice = outcome.task.space, outcome.choice
    about = {"schedule": space.schedule, "workload": dict(space.workload), "points": outcome.points}
    about |= {"noise": outcome.noise, "trials": outcome.trials, "new": outcome.new, "failed": outcome.failed}
    keys = ("gained", "knobs", "best", "default", "seconds", "default_seconds", "speedup", "wins", "rounds", "gb_s",
            "gmac_s", "read_gb_s", "instructions", "cycles", "default_instructions", "default_cycles")  # fmt: skip
    return about | {"choice": None if choice is None else {key: choice[key] for key in keys if key in choice}}


def _verdict(outcome: Outcome) -> str:
    """What came of a shape: points tried, default and best, the gain from min to max, the knobs of what won."""
    tried = f"{outcome.trials} of {outcome.points} tried" + (f", {outcome.failed} failed" if outcome.failed else "")
    choice = outcome.choice
    if choice is None:
        return f"{tried}: nothing measured" if outcome.trials == outcome.failed else f"{tried}: not decided yet"
    speedup, modelled = choice["speedup"], "cycles" in choice
    verdict = f"default stays: the gain is {'too small' if modelled else 'inside the noise'}"
    if choice["gained"]:
        changed = {k: v for k, v in choice["best"].items() if v != choice["default"][k]}
        verdict = " ".join(f"{k}={v}" for k, v in changed.items())
    elif speedup["median"] <= 1:
        verdict = "default stays: nothing was faster"
    if modelled:
        default, best = _cost(choice, "default_"), _cost(choice, "")
        gain = f"{speedup['median']:.3f}x of the cycles, modelled"
    else:
        default, best = (_speed(choice, choice[name]["median"]) for name in ("default_seconds", "seconds"))
        gain = f"{speedup['median']:.2f}x ({speedup['min']:.2f} to {speedup['max']:.2f})"
    return f"{tried}: {default} -> {best}, {gain}: {verdict}"


def _cost(choice: dict[str, Any], whose: str) -> str:
    return f"{choice[f'{whose}cycles']:.4g} cycles, {choice[f'{whose}instructions']:.4g} instructions"


def _speed(choice: dict[str, Any], seconds: float) -> str:
    """Microseconds, and GB/s beside the ceiling for one token, GMAC/s for several."""
    scale = choice["seconds"]["median"] / seconds
    if choice["workload"].get("m") == 1:
        rate = f"{choice['gb_s'] * scale:.1f} of {choice['read_gb_s']:.1f} GB/s"
    else:
        rate = f"{choice['gmac_s'] * scale:.0f} GMAC/s" if choice["gmac_s"] else ""
    us = seconds * 1e6
    return f"{us:.3g} us {rate}".rstrip() if us < 100 else f"{us:.0f} us {rate}".rstrip()
