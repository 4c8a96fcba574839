"""The tracker of TVM (`python -m tvm.exec.rpc_tracker`), where boards are offered and asked for: its protocol.

Messages are an int32 length, little-endian, and that many bytes of JSON; the first value is a code. A board offers
itself with a key ("rpi4") and a match key, which whoever gets the board must show to it: so a board is lent to one at a
time. TVM 0.27, tvm/rpc/tracker.py and base.py.
"""

from __future__ import annotations

import json
import random
import select
import socket
import struct
from typing import Any, NamedTuple, Optional

MAGIC = 0x2F271
SUCCESS, PUT, REQUEST, UPDATE_INFO, SUMMARY, PENDING = 0, 3, 4, 5, 6, 7
MOST_BYTES = 1 << 20  # of a message: they are short
REPLY_S = 10.0


class TrackerError(OSError):
    """What answers is not a tracker, or it refuses."""


class Address(NamedTuple):
    """HOST:PORT."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """As "127.0.0.1:9190" or "[::1]:9190"; ValueError says what is wrong."""
        host, _, port = text.rpartition(":")
        host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
            raise ValueError(f"{text!r} is not HOST:PORT")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Offer(NamedTuple):
    """A board that was lent: where it listens, and what to show it."""

    host: str
    port: int
    match_key: str


class Tracker:
    """A connection to a tracker. Its methods raise OSError when it is gone."""

    def __init__(self, address: Address, timeout_s: float = REPLY_S) -> None:
        self._socket = socket.create_connection(address, timeout_s)
        try:
            self._socket.sendall(struct.pack("<i", MAGIC))
            if struct.unpack("<i", receive(self._socket, 4))[0] != MAGIC:
                raise TrackerError(f"{address} is no TVM tracker")
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """The tracker forgets what this connection offered."""
        self._socket.close()

    def fileno(self) -> int:
        """For select: readable means closed, because nothing comes unasked."""
        return self._socket.fileno()

    def introduce(self, key: str, host: Optional[str], port: int) -> None:
        """State what the tracker's list of boards shows of this connection."""
        self._succeed(UPDATE_INFO, {"key": f"server:{key}", "addr": [host, port]})

    def offer(self, key: str, host: Optional[str], port: int) -> str:
        """Offer a board, once; gives its match key. host None: where this connection comes from."""
        match_key = f"{key}:{random.SystemRandom().random()}"
        self._succeed(PUT, key, [port, match_key], host)
        return match_key

    def pending(self) -> list[str]:
        """Match keys of this connection that nobody has asked for yet."""
        found = self._ask(PENDING)
        return [str(key) for key in found] if isinstance(found, list) else []

    def summary(self) -> dict[str, Any]:
        """Boards and queues, as the tracker tells them."""
        found = self._ask(SUMMARY)
        if not (isinstance(found, list) and len(found) == 2 and isinstance(found[1], dict)):
            raise TrackerError("the tracker gave no summary")
        return found[1]

    def request(self, key: str, within_s: float) -> Optional[Offer]:
        """The next board of that key, None when there is none in that time. Use a connection for one request only."""
        self._send(REQUEST, key, "", 1)
        if not select.select([self._socket], [], [], within_s)[0]:
            return None
        found = self._receive()
        try:
            code, (host, port, match_key) = found
            if code != SUCCESS:
                raise TrackerError(f"the tracker refuses: {found}")
            return Offer(str(host), int(port), str(match_key))
        except (TypeError, ValueError):
            raise TrackerError("the tracker offers something that is no board") from None

    def _succeed(self, *message: Any) -> None:
        if self._ask(*message) != SUCCESS:
            raise TrackerError("the tracker refuses the board")

    def _ask(self, *message: Any) -> Any:
        self._send(*message)
        return self._receive()

    def _send(self, *message: Any) -> None:
        text = json.dumps(message).encode()
        self._socket.sendall(struct.pack("<i", len(text)) + text)

    def _receive(self) -> Any:
        size = struct.unpack("<i", receive(self._socket, 4))[0]
        if not 0 < size <= MOST_BYTES:
            raise TrackerError("the tracker sent something that is no message")
        try:
            return json.loads(receive(self._socket, size))
        except ValueError:
            raise TrackerError("the tracker sent something that is no JSON") from None


def receive(source: socket.socket, count: int) -> bytes:
    """Exactly that many bytes; OSError when the other end closes before."""
    found = b""
    while len(found) < count:
        piece = source.recv(count - len(found))
        if not piece:
            raise ConnectionResetError("the other end closed the connection")
        found += piece
    return found
