"""Tests that wait for another process."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 60.0


def wait_for(what: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Until it is true. Raises AssertionError when that takes too long."""
    end = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < end, "nothing has happened"
        time.sleep(0.02)
