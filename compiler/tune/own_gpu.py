"""This machine as a board for its own GPU: a tracker and an rpc-server here, while tuning lasts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from compiler.errors import UserError
from compiler.tune import tracker
from compiler.tune.measure import REPOSITORY
from runtime.rpc_tracker import Address

HOST = "127.0.0.1"


@contextmanager
def offered(key: str) -> Iterator[Address]:
    """The tracker that lends it as `key`. Server and tracker end with this process, however that ends."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    with tracker.running() as address:
        command = [sys.executable, "-m", "runtime", "rpc-server", "--tracker", str(address), "--key", key]
        command += ["--port", "0", "--tunnel"]  # it says where it listens, and ends when its stdin does
        with subprocess.Popen(
            command, env=environment, text=True, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            assert process.stdin is not None and process.stdout is not None
            try:
                line = process.stdout.readline()
                if not line:
                    raise UserError(
                        "The rpc-server that times kernels on this machine's GPU did not start. Start it in another "
                        "window to see why, and give --rpc: see docs/boards.md."
                    )
                process.stdin.write(f"{Address(HOST, json.loads(line)['port'])}\n")
                process.stdin.flush()
                yield address
            finally:
                process.stdin.close()
                process.kill()
