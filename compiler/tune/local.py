"""Timing of candidates on this machine: interleaved with the default and with a reader of memory, in a process."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from compiler.tune.measure import LEAST_BYTES, OPEN_S, CandidateFailed, CandidateLost, WorkerMeasurer
from runtime import board
from schedules.kernel import Request, Space


@dataclass
class LocalMeasurer(WorkerMeasurer):
    """This machine, through a worker process that is replaced when it hangs or crashes."""

    least_bytes: int = field(default_factory=lambda: max(LEAST_BYTES, 4 * board.last_level_cache_bytes()))

    worker: ClassVar[str] = "compiler.tune.local_worker"

    def _open(self, request: Request, space: Space) -> None:
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
