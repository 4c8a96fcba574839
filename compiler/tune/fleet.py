"""Several boards tune together: each takes the next batch when it is free, and none waits for another without need.

A slot is a thread with a measurer that has one board at a time. A batch whose board is lost or hot goes back and is
anybody's. A slot that had nothing but trouble for `patience_s` ends; tuning goes on with the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from compiler.tune.boards import BoardMeasurer
from compiler.tune.measure import DeviceLost, NoisyError
from compiler.tune.search import Job, Outcome, Progress, Task, Tuner

PATIENCE_S = 900.0
PAUSE_S, MOST_PAUSE_S = 1.0, 60.0  # of a slot after trouble; it doubles
WATCH_S = 0.2


class Fleet:
    """The slots and what they share. tell: gets a line about every change of a board's fortune."""

    def __init__(
        self,
        tuner: Tuner,
        measurers: Sequence[BoardMeasurer],
        tell: Callable[[str], None],
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.tuner, self.measurers, self.tell, self.patience_s = tuner, measurers, tell, patience_s
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._progresses: list[Progress] = []
        self._running = 0  # jobs
        self._failure: BaseException | None = None
        self._trouble = ""

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        """All tasks, as far as boards and time allow. Raises what a slot met that is no trouble of a board."""
        self._progresses = [self.tuner.begin(task) for task in tasks]
        for measurer in self.measurers:
            measurer.cancelled = self._over.is_set
        slots = [threading.Thread(target=self._slot, args=(m, i), daemon=True) for i, m in enumerate(self.measurers, 1)]
        try:
            for slot in slots:
                slot.start()
            while any(slot.is_alive() for slot in slots):  # Ctrl-C gets through between two naps
                time.sleep(WATCH_S)
        finally:
            self._over.set()
            for slot in slots:
                slot.join()
        if self._failure is not None:
            raise self._failure
        for progress in self._progresses:
            if self._trouble and not self.tuner.complete(progress.task):
                progress.noise = self._trouble
        return [self.tuner.outcome(progress) for progress in self._progresses]

    def _slot(self, measurer: BoardMeasurer, number: int) -> None:
        """Jobs on one board after the other until there are no more."""
        try:
            self._work(measurer, f"board {number}")
        except BaseException as error:  # the user's mistake, or ours: it is the main thread's
            with self._changed:
                self._failure = self._failure or error
                self._over.set()
        finally:
            measurer.close()
            with self._changed:
                self._changed.notify_all()

    def _work(self, measurer: BoardMeasurer, name: str) -> None:
        well, pause_s, told = time.monotonic(), PAUSE_S, ""
        while not self._over.is_set():
            job = None
            try:
                measurer.ready()
                job = self._next()
                if job is None:
                    return
                task = job.progress.task
                batch = measurer.measure(task.request, task.space, job.candidates, job.rounds)
            except (DeviceLost, NoisyError) as error:
                if job is not None:
                    self._done(job, self.tuner.give_back)
                if self._over.is_set() or (self.tuner.stop() and not self._running):
                    return
                if str(error) != told:
                    self.tell(f"{name}: {error}")
                told = self._trouble = str(error)
                if time.monotonic() - well > self.patience_s:
                    self.tell(f"{name}: given up after {self.patience_s:.0f} s")
                    return
                self._over.wait(pause_s)
                pause_s = min(2 * pause_s, MOST_PAUSE_S)
            except BaseException:
                if job is not None:
                    self._done(job, self.tuner.give_back)
                raise
            else:
                self._done(job, lambda job: self.tuner.finish(job, batch, measurer.setting))  # noqa: B023  called now
                if told:
                    self.tell(f"{name}: is back at work")
                well, pause_s, told = time.monotonic(), PAUSE_S, ""

    def _next(self) -> Job | None:
        """A job for whoever asks; waits while others may still give theirs back. None: nothing will come."""
        with self._changed:
            while not self._over.is_set():
                for progress in self._progresses:
                    job = self.tuner.next(progress)
                    if job is not None:
                        self._running += 1
                        return job
                if self._running == 0:
                    self._over.set()
                    self._changed.notify_all()
                    return None
                self._changed.wait(WATCH_S)
            return None

    def _done(self, job: Job, how: Callable[[Job], None]) -> None:
        with self._changed:
            try:
                how(job)
            finally:
                self._running -= 1
                self._changed.notify_all()
