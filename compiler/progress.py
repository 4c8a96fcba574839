"""What a build tells while it runs: stages with elapsed time and sizes, or nothing, or JSON at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

MIB = 1 << 20


@dataclass
class Stage:
    """One step of a build. `note` ends its line; `advance` moves the bar towards `total`."""

    title: str
    note: str = ""
    seconds: float = 0.0
    bytes: int | None = None
    _bar: Progress | None = None
    _task: int = 0

    def total(self, amount: float) -> None:
        """How far `advance` will go in all."""
        if self._bar is not None:
            self._bar.update(self._task, total=amount)  # type: ignore[arg-type]

    def advance(self, amount: float) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.advance(self._task, amount)  # type: ignore[arg-type]


@dataclass
class Reporter:
    """Prints stages to stderr unless `quiet`; keeps all of them for the JSON summary."""

    quiet: bool = False
    stages: list[Stage] = field(default_factory=list)
    console: Console = field(default_factory=lambda: Console(file=sys.stderr, highlight=False))

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Time what happens inside; the line is printed when it ends without an error."""
        stage = Stage(title)
        started = time.perf_counter()
        if self.quiet or not self.console.is_terminal:
            yield stage
        else:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            with Progress(*columns, console=self.console, transient=True) as bar:
                stage._bar, stage._task = bar, bar.add_task(f"{title:<10}", total=None)
                yield stage
        stage.seconds = time.perf_counter() - started
        stage._bar = None
        self.stages.append(stage)
        if not self.quiet:
            size = "" if stage.bytes is None else f"{stage.bytes / MIB:9.1f} MiB"
            self.console.print(f"  {title:<10} {stage.seconds:7.2f} s {size:>13}  {escape(stage.note)}", soft_wrap=True)

    def line(self, text: str) -> None:
        """A line between stages."""
        if not self.quiet:
            self.console.print(escape(text), soft_wrap=True)
