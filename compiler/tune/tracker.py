"""TVM's tracker in a process of its own, while tuning lasts: `python -m compiler.tune.tracker` prints its port.

`python -m tvm.exec.rpc_tracker` is the same for boards that are shared by many; it leaves a process behind when it is
killed, which this one does not.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from compiler.errors import UserError
from runtime.rpc_tracker import Address

HOST, FIRST, END = "127.0.0.1", 9190, 9290  # the first free port of these
PR_SET_PDEATHSIG = 1


@contextmanager
def running() -> Iterator[Address]:
    """Start it, give its address, end it. Raises UserError when a package is missing."""
    command = [sys.executable, "-m", "compiler.tune.tracker"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            port = process.stdout.readline()
            if not port.strip().isdigit():
                raise UserError("TVM's tracker did not start. It needs tornado: pip install 'quern[tune]'.")
            yield Address(HOST, int(port))
        finally:
            process.kill()


def main() -> None:
    """Serve until the parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    from tvm.rpc.tracker import PopenTrackerServerState

    state = PopenTrackerServerState(HOST, FIRST, END, silent=True)
    sys.stdout.write(f"{state.port}\n")
    sys.stdout.flush()
    state.thread.join()


if __name__ == "__main__":
    main()
