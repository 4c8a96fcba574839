"""A board offers itself for tuning: it waits for clients whom TVM's tracker sends, and serves one at a time.

Every client is served by a process of its own (rpc_session.py), which ends with the connection, at the time limit, or
with this one, whichever comes first; what ended it, the client is told. This process loads no compiled code.

A client may upload a library and call what is in it: it may do whatever this user may. So the server listens on
loopback unless --bind says otherwise, and a client must show the match key that the tracker gave it. Neither is a
defence in a network where strangers are: use an SSH tunnel there.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, TextIO

from . import rpc_cuda, tvm_libs
from .errors import InputError
from .rpc_tracker import Address, Tracker, receive

MAGIC, MISMATCH = 0xFF271, 0xFF271 + 2  # TVM 0.27, tvm/rpc/base.py
EXCEPTION, RAW_STR = 5, 8  # RPCCode::kException, kTVMFFIRawStr: src/runtime/rpc/minrpc/rpc_reference.h
HELLO_S, MOST_KEY_BYTES = 5.0, 4096  # for a client to introduce itself
PERIOD_S = 2.0  # between looks at the tracker
UNUSED_S = 6.0  # a client that got the board has that long to come for it
RETRY_S, MOST_RETRY_S = 0.5, 10.0  # of the tracker's address
STEP_S, GRACE_S = 0.1, 1.0
LIMIT_S = 1800.0  # of a session
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a client without power is gone after 30 s
PR_SET_PDEATHSIG = 1
ENDED = "quern: the session ended: "  # how a message to the client begins


@dataclass
class Server:
    """advertised: where clients find the board, None: at this machine's address as the tracker sees it.

    tunnel: the other end is a program that made a tunnel to here. It reads the port from stdout, says on stdin what to
    advertise, and this server ends when its stdin does.
    """

    tracker: Address
    key: str
    bind: str = "127.0.0.1"
    port: int = 0
    limit_s: float = LIMIT_S
    threads: Optional[int] = None
    tunnel: bool = False
    log: TextIO = field(default_factory=lambda: sys.stderr)
    _listener: Optional[socket.socket] = None
    _advertised: Optional[Address] = None
    _connection: Optional[Tracker] = None
    _match_key: str = ""
    _unused_since: Optional[float] = None

    def run(self) -> None:
        """Serve until stdin ends in a tunnel, or a signal comes."""
        tvm_libs.find()  # before a client finds out
        self._listen()
        try:
            while self._wait():
                client, options = self._welcome()
                if client is not None:
                    with client:
                        self._serve(client, options)
                    self._withdraw()
        finally:
            self._withdraw()
            if self._listener is not None:
                self._listener.close()

    def _listen(self) -> None:
        try:
            family = socket.getaddrinfo(self.bind, self.port, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((self.bind, self.port), family=family)
        except OSError as error:
            raise InputError(
                f"{Address(self.bind, self.port)}: cannot be listened on: {_reason(error)}. "
                f"Give another --port (0: any that is free), or an address of this machine to --bind."
            ) from None
        self.port = self._listener.getsockname()[1]
        if not _is_loopback(self.bind):
            self._say(
                f"warning: whoever reaches {Address(self.bind, self.port)} may run programs as this user. Use this in "
                f"a network that you trust, or leave --bind out and use an SSH tunnel."
            )
        self._advertised = None if _is_any(self.bind) else Address(self.bind, self.port)
        if self.tunnel:
            print(json.dumps({"port": self.port}), flush=True)
            try:
                self._advertised = Address.parse(sys.stdin.readline().strip())
            except ValueError as error:
                raise InputError(f"--tunnel: {error} on stdin.") from None

    def _wait(self) -> bool:
        """Until a client comes; meanwhile see to it that the tracker offers us. False: stdin has ended."""
        while True:
            self._offer()
            watched: list[Any] = [self._listener, self._connection] + [sys.stdin] * self.tunnel
            ready = select.select(watched, [], [], PERIOD_S)[0]
            if sys.stdin in ready and self.tunnel and not os.read(sys.stdin.fileno(), 4096):
                return False
            if self._listener in ready:
                return True
            if self._connection in ready:
                self._withdraw("the tracker is gone")
            elif not ready:
                self._renew()

    def _offer(self) -> None:
        """Tell the tracker that we are free. Tries until there is a tracker."""
        pause = RETRY_S
        while self._connection is None:
            try:
                self._connection = Tracker(self.tracker)
                host, port = self._advertised or (None, self.port)
                self._connection.introduce(self.key, host, port)
                self._match_key = self._connection.offer(self.key, host, port)
                self._unused_since = None
                self._say(f"{Address(self.bind, self.port)} is offered as {self.key} by the tracker at {self.tracker}")
            except OSError as error:  # noqa: PERF203
                self._withdraw()
                if pause == RETRY_S:
                    self._say(f"no tracker at {self.tracker}: {error.strerror or error}; trying until there is one")
                watched = [sys.stdin] * self.tunnel
                if select.select(watched, [], [], pause)[0] and not os.read(sys.stdin.fileno(), 4096):
                    raise SystemExit(0) from None
                pause = min(2 * pause, MOST_RETRY_S)

    def _renew(self) -> None:
        """Offer ourselves anew when somebody got our match key and never came."""
        assert self._connection is not None
        try:
            if self._match_key in self._connection.pending():
                self._unused_since = None
            elif self._unused_since is None:
                self._unused_since = time.monotonic()
            elif time.monotonic() - self._unused_since > UNUSED_S:
                self._withdraw()
        except OSError:
            self._withdraw("the tracker is gone")

    def _withdraw(self, why: str = "") -> None:
        """Close the tracker's connection: it forgets the offer."""
        if why:
            self._say(why)
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _welcome(self) -> tuple[Optional[socket.socket], dict[str, str]]:
        """A client that shows our match key, and its options; None for anybody else."""
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:
            return None, {}
        try:
            client.settimeout(HELLO_S)
            magic, size = struct.unpack("<ii", receive(client, 8))
            if magic != MAGIC or not 0 <= size <= MOST_KEY_BYTES:
                raise ConnectionError("no client of TVM")
            shown, *words = receive(client, size).decode(errors="replace").split()
            if shown != f"client:{self._match_key}":
                client.sendall(struct.pack("<i", MISMATCH))
                raise ConnectionError("another match key")
            name = f"server:{self.key}".encode()
            client.sendall(struct.pack("<ii", MAGIC, len(name)) + name)
            client.settimeout(None)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE.items():
                client.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        except (OSError, ValueError) as error:
            self._say(f"a stranger was sent away: {error}")
            client.close()
            return None, {}
        options = (word[1:].partition("=") for word in words if word.startswith("-"))
        return client, {name: value for name, _, value in options}

    def _serve(self, client: socket.socket, options: dict[str, str]) -> None:
        """Until the session's process has ended, one way or another."""
        limit_s = min(_number(options.get("timeout"), self.limit_s), self.limit_s)
        threads = int(_number(options.get("threads"), self.threads or 0)) or None
        folder = Path(tempfile.mkdtemp(prefix="quern-rpc-"))
        try:
            self._say("a client came")
            server, child = os.getpid(), os.fork()
            if child == 0:
                self._be_session(server, client, folder, threads)
            why = self._watch(child, client, limit_s)
            self._say(f"the session ended{': ' if why else ''}{why}")
            if why:
                with contextlib.suppress(OSError):
                    client.settimeout(HELLO_S)
                    client.sendall(exception(f"{ENDED}{why}"))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _be_session(self, server: int, client: socket.socket, folder: Path, threads: Optional[int]) -> None:
        """The child: never returns."""
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.setpgid(0, 0)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            assert self._listener is not None
            self._listener.close()
            if self._connection is not None:
                self._connection.close()
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            if self.tunnel:
                os.dup2(null, 1)  # a tunnel's stdout is ours
            os.chdir(folder)
            if os.getppid() == server:
                from .rpc_session import Session

                Session(folder, threads).serve(client.fileno())
        except BaseException as error:  # a child must not unwind into the server's code
            self._say(f"the session failed: {error}")
            with contextlib.suppress(OSError):
                client.sendall(exception(f"{ENDED}{error}"))
        finally:
            os._exit(0)

    def _watch(self, child: int, client: socket.socket, limit_s: float) -> str:
        """Wait for the child; end it with its connection, at its limit, or with the tunnel. Gives what to tell."""
        poll = select.poll()
        poll.register(client, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
        end, left_at, told = time.monotonic() + limit_s, 0.0, ""
        try:
            while True:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    break
                if left_at == 0 and poll.poll(0):
                    left_at = time.monotonic()
                gone = left_at > 0 and time.monotonic() > left_at + GRACE_S
                if gone or time.monotonic() > end or self._tunnel_ended():
                    told = "" if gone else f"its time limit of {limit_s:g} s has passed"
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child, signal.SIGKILL)
                    _, status = os.waitpid(child, 0)
                    break
                time.sleep(STEP_S)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            raise
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # whatever it started
        if left_at or told:
            return told
        if os.WIFSIGNALED(status):
            return f"signal {os.WTERMSIG(status)}, {signal.strsignal(os.WTERMSIG(status))}"
        if os.WEXITSTATUS(status) == rpc_cuda.LOST:
            return "a kernel failed on its GPU"
        return f"exit code {os.WEXITSTATUS(status)}" if os.WEXITSTATUS(status) else ""

    def _tunnel_ended(self) -> bool:
        if not self.tunnel or not select.select([sys.stdin], [], [], 0)[0]:
            return False
        return not os.read(sys.stdin.fileno(), 4096)

    def _say(self, what: str) -> None:
        with contextlib.suppress(OSError):
            print(f"rpc-server: {what}", file=self.log, flush=True)


def exception(message: str) -> bytes:
    """What TVM's client takes for an exception in the call that it waits for."""
    text = message.encode()
    body = struct.pack("<iiiQ", EXCEPTION, 1, RAW_STR, len(text)) + text
    return struct.pack("<Q", len(body)) + body


def _reason(error: OSError) -> str:
    """Without what socket.create_server adds."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)


def _number(text: object, default: float) -> float:
    """A positive number that a client states, else the default."""
    try:
        value = float(str(text))
    except ValueError:
        return default
    return value if 0 < value < 1e9 else default


def _is_loopback(host: str) -> bool:
    return host == "localhost" or _address(host, "is_loopback")


def _is_any(host: str) -> bool:
    return _address(host, "is_unspecified")


def _address(host: str, what: str) -> bool:
    try:
        return bool(getattr(ipaddress.ip_address(host), what))
    except ValueError:
        return False
