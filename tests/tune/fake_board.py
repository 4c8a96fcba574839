"""A board of this machine's kind with a fault: the runtime's own rpc-server over real sockets, one method exchanged.

`python -m tests.tune.fake_board TRACKER KEY FAULT FILE`. FILE is where a fault counts how often it happened, because
every session is a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime import rpc_session
from runtime.rpc_server import Server
from runtime.rpc_tracker import Address, Tracker
from tests.waiting import wait_for

REPO = Path(__file__).parents[2]
HOT_LOOKS, HOT = 3, 1.5
original = rpc_session.Session


class Board(rpc_session.Session):
    """A board in order, that counts."""

    file = Path()

    def count(self) -> int:
        """How often this was called, over all sessions."""
        with self.file.open("a") as file:
            file.write(".")
        return self.file.stat().st_size


class Hangs(Board):
    """Never comes back from its first measurement."""

    def time(self, text: str, rounds: int) -> str:
        if self.count() == 1:
            time.sleep(1000)
        return super().time(text, rounds)


class Garbage(Board):
    """Answers its first measurements with what is no JSON, no numbers, and too few of them."""

    def time(self, text: str, rounds: int) -> str:
        found = json.loads(super().time(text, rounds))
        wrong = ([[[-1.0]]], found["seconds"][1:])
        nonsense = ["{]", *(json.dumps(found | {"seconds": seconds}) for seconds in wrong)]
        count = self.count()
        return nonsense[count - 1] if count <= len(nonsense) else json.dumps(found)


class Vanishes(Board):
    """Loses its power when it prepares its third kernel, for the first time."""

    def prepare(self, name: str) -> str:
        if self.count() == 3:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(1000)
        return super().prepare(name)


class AlwaysVanishes(Board):
    """Cannot stand any kernel but the first."""

    def prepare(self, name: str) -> str:
        if isinstance(self.workload, rpc_session.Workload) and self.workload.functions:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare(name)


class Dies(Board):
    """Has a fault in its CPU that one candidate meets: the one that it runs second in its first session."""

    def prepare(self, name: str) -> str:
        known = self.file.read_text().split() if self.file.exists() else []
        if name not in known:
            self.file.write_text(" ".join([*known, name]))
        if [*known, name].index(name) == 1:
            os.kill(os.getpid(), signal.SIGILL)
        return super().prepare(name)


class Lies(Board):
    """Has a fault in its memory: results differ from run to run."""

    def outputs(self) -> bytes:
        found = super().outputs()
        # without the exponents' highest bit: numbers, all of them
        return found if self.count() == 1 else bytes(byte & 0xBF for byte in os.urandom(len(found)))


class Hot(Board):
    """Throttles for its first looks at the clock but one, and then cools."""

    def time(self, text: str, rounds: int) -> str:
        found = json.loads(super().time(text, rounds))
        found["spins"] = [1.0] * (rounds + 1)
        if 1 < self.count() <= 1 + HOT_LOOKS:
            found["spins"][-1] = HOT
        return json.dumps(found)


class Slow(Board):
    """A long way off."""

    def time(self, text: str, rounds: int) -> str:
        time.sleep(1.5)
        return super().time(text, rounds)


FAULTS: dict[str, type[Board]] = {
    fault.__name__: fault for fault in (Board, Hangs, Garbage, Vanishes, AlwaysVanishes, Dies, Lies, Hot, Slow)
}


@contextmanager
def offered(tracker: Address, key: str, fault: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A board that the tracker has to give."""
    command = [sys.executable, "-m", "tests.tune.fake_board", str(tracker), key, fault, str(folder / f"{key}-{fault}")]
    with (folder / f"{key}.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=REPO, stderr=log)
    try:
        wait_for(lambda: free(tracker, key))
        yield process
    finally:
        process.kill()
        process.wait()


def free(tracker: Address, key: str) -> int:
    """Boards of that key that nobody has."""
    connection = Tracker(tracker)
    try:
        found: dict[str, Any] = connection.summary()["queue_info"].get(key, {})
        return int(found.get("free", 0))
    finally:
        connection.close()


if __name__ == "__main__":
    FAULTS[sys.argv[3]].file = Path(sys.argv[4])
    rpc_session.Session = FAULTS[sys.argv[3]]  # type: ignore[misc]
    Server(Address.parse(sys.argv[1]), sys.argv[2], port=0, threads=1).run()
