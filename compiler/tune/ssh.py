"""Boards that are reached over SSH: everything they need is copied there once, started, and ended with tuning.

Per board one connection. The tracker here is forwarded to the board's loopback, the board's server to ours, so that no
port is open in any network. The server ends when its stdin does, and with it when the connection breaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncssh

from compiler.codegen import carried
from compiler.deploy import machine
from compiler.deploy.connection import DEFAULT_FOLDER, DeployError, Place, Remote, connect, parse_place
from compiler.tune import tracker
from runtime.rpc_tracker import Address
from targets import Target

LOOPBACK = "127.0.0.1"
LIBRARIES = ("libtvm_ffi.so", "libtvm_runtime.so")
FOLDER = ".cache/quern-rpc"  # below the home there, unless the place names another; a folder in it for every release
RETRY_S, MOST_RETRY_S = 5.0, 60.0  # of a connection that was lost
START_S, END_S = 60.0, 5.0
_DIGESTS = """
cd "$1" 2>/dev/null || exit 0; shift
exec python3 -c '
import hashlib, sys
for name in sys.argv[1:]:
    try: print(hashlib.sha256(open(name, "rb").read()).hexdigest(), name)
    except OSError: pass' "$@"
"""
_PUT = 'mkdir -p "$1" && cd "$1" && cat >"$2.part" && mv -f "$2.part" "$2"'
_START = """
cd "$1" || exit 1
export PYTHONPATH="$PWD/runtime.zip" QUERN_TVM_LIBS="$PWD"
for python in python3 python3.12 python3.11 python3.10 python3.9 python3.8; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
    exec "$python" -m runtime rpc-server --tracker "127.0.0.1:$2" --key "$3" --port 0 --tunnel
  fi
done
echo 'it has no Python 3.8 or later. On Ubuntu and JetPack: sudo apt install python3.8' >&2
exit 1
"""


@contextmanager
def boards(
    places: Sequence[str], key: str, target: Target, port: int | None, identity: Path | None
) -> Iterator[Address]:
    """A tracker here, at the address that this gives, and the boards that offer themselves to it as `key`.

    Raises DeployError when one of them cannot be had at first; one that is lost later is tried again and again.
    """
    parsed = [parse_place(text) for text in places]
    with tracker.running() as address, _files(target) as files, _loop() as loop:
        stop = asyncio.Event()
        up: list[Future[None]] = [Future() for _ in parsed]
        there = [_Board(place, key, target, port, identity, files) for place in parsed]
        pairs = zip(there, up, strict=True)
        keeping = [asyncio.run_coroutine_threadsafe(_keep(b, address, future, stop), loop) for b, future in pairs]
        try:
            for future in up:
                future.result()
            yield address
        finally:
            loop.call_soon_threadsafe(stop.set)
            for task in keeping:
                with contextlib.suppress(Exception):
                    task.result(END_S)


@contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def _files(target: Target) -> Iterator[dict[str, bytes]]:
    """What a board needs besides Python: name -> content."""
    libraries = {name: content for name, content in carried.fetch(target.arch).items() if name in LIBRARIES}
    with tempfile.TemporaryDirectory(prefix="quern-rpc-") as scratch:
        carried.write(libraries, Path(scratch))
        yield libraries | {carried.RUNTIME: (Path(scratch) / carried.RUNTIME).read_bytes()}


class _Board:
    """One board, and what it gets."""

    def __init__(
        self, place: Place, key: str, target: Target, port: int | None, identity: Path | None, files: dict[str, bytes]
    ) -> None:
        self.place, self.key, self.target, self.port, self.identity = place, key, target, port, identity
        self.digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        self.files = files
        release = hashlib.sha256(json.dumps(self.digests, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = f"{FOLDER if place.folder == f'./{DEFAULT_FOLDER}' else place.folder}/{release}"

    async def serve(self, address: Address, up: Future[None], stop: asyncio.Event) -> None:
        """Until `stop`, or raises DeployError when the board or its server is lost."""
        async with connect(self.place, self.port, self.identity) as remote:
            found = await machine.look(remote, ".")
            if found.arch != self.target.arch:
                raise DeployError(f"{self.place}: is {found.arch}, but {self.target.name} is {self.target.arch}.")
            await self._install(remote)
            try:
                back = await remote.connection.forward_remote_port(LOOPBACK, 0, address.host, address.port)
            except asyncssh.ChannelListenError as error:
                raise DeployError(
                    f"{self.place}: its SSH server allows no tunnel back: {error}. Set AllowTcpForwarding yes."
                ) from None
            async with remote.process(_START, self.folder, str(back.get_port()), self.key) as process:
                log = asyncio.ensure_future(process.stderr.read())
                await self._introduce(remote, process, log)
                if not up.done():
                    up.set_result(None)
                ended = asyncio.ensure_future(process.wait())
                asked = asyncio.ensure_future(stop.wait())
                await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
                asked.cancel()
                if not stop.is_set():
                    remote.check(process, await log)
                    raise DeployError(f"{self.place}: its rpc-server ended.")
                process.stdin.write_eof()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(ended, END_S)

    async def _introduce(self, remote: Remote, process: Any, log: asyncio.Future[Any]) -> None:
        """The server says where it listens; we say where clients find it."""
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_S)
            port = int(json.loads(line)["port"])
        except (ValueError, KeyError, TypeError, asyncio.TimeoutError):
            process.stdin.write_eof()
            with contextlib.suppress(asyncio.TimeoutError):
                remote.check(process, await asyncio.wait_for(log, END_S))
            raise DeployError(f"{self.place}: the rpc-server there does not say where it listens.") from None
        there = await remote.connection.forward_local_port(LOOPBACK, 0, LOOPBACK, port)
        process.stdin.write(f"{LOOPBACK}:{there.get_port()}\n".encode())

    async def _install(self, remote: Remote) -> None:
        """Copy what is not there yet, or is not what it should be."""
        for name in await self._lacking(remote):
            async with remote.process(_PUT, self.folder, name) as process:
                process.stdin.write(self.files[name])
                process.stdin.write_eof()
                _, err = await process.communicate()
                remote.check(process, err)
        if damaged := await self._lacking(remote):
            raise DeployError(f"{self.place}: {damaged[0]} was damaged on its way. Run the same command again.")

    async def _lacking(self, remote: Remote) -> list[str]:
        lines = (await remote.output(_DIGESTS, self.folder, *self.files)).splitlines()
        return [name for name, digest in self.digests.items() if f"{digest} {name}" not in lines]


async def _keep(board: _Board, address: Address, up: Future[None], stop: asyncio.Event) -> None:
    """Serve on a board, again when it was lost: it may have been started anew."""
    pause = RETRY_S
    while not stop.is_set():
        try:
            await board.serve(address, up, stop)
            return
        except Exception as error:
            if not up.done():
                up.set_exception(error)
                return
            sys.stderr.write(f"{error}\n")
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), pause)
        pause = min(2 * pause, MOST_RETRY_S)
