"""A server for one bundle: OpenAI's chat completions and completions over HTTP, whole or as server-sent events.

One thread computes (worker.py); each connection has a thread that reads, waits and writes. Who goes away stops what is
computed for him at the next token, or between two calls of a long prompt.

By default only this machine may ask. A web page that the user looks at may do that too, by form or by a name that
resolves to this machine; hence requests must be of the type application/json, which browsers do not send elsewhere
unasked, and while no key is set, Host must be a name of this machine.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import queue
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Optional, Union

from .completions import Answer, Defaults, Reader, parse
from .errors import ContextFullError, InputError
from .session import Session
from .tokenizer import Tokenizer
from .worker import End, Job, Worker

MOST_BYTES = 8 << 20  # of a request
MOST_CONNECTIONS = 64
MOST_WAITING = 16  # requests behind the one that is computed
SILENCE_S = 30  # how long a client may take to send or take in something
LOOK_S = 0.25  # how often a client that waits is looked at
SIGNAL_S = 0.5  # a signal just before the main thread begins to wait, or to another thread, does not end the wait
PATHS = {"/v1/chat/completions": "POST", "/v1/completions": "POST", "/v1/models": "GET", "/health": "GET"}


class Refused(Exception):
    """A request that gets an HTTP status and a message instead of text."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: Optional[str] = None):
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code

    @classmethod
    def because(cls, error: BaseException) -> Refused:
        """Of an error in this runtime: the request's fault or ours."""
        if isinstance(error, ContextFullError):
            return cls(400, str(error), code="context_length_exceeded")
        if isinstance(error, InputError):
            return cls(400, str(error))
        what = "out of memory" if isinstance(error, MemoryError) else str(error)
        return cls(500, what, "server_error")


class Server:
    """Listens from the start; `run` answers until it is interrupted. address: port 0 takes any that is free."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        defaults: Defaults,
        address: tuple[str, int] = ("127.0.0.1", 8080),
        key: Optional[str] = None,
    ) -> None:
        self.model, self.context, self.key = session.manifest.model.name, session.context, key
        self.reader = Reader(session.manifest, defaults)
        self.jobs: queue.Queue[Job] = queue.Queue(MOST_WAITING)
        self._worker = Worker(session, tokenizer)
        self._http = _Http(self, address)
        self.port: int = self._http.server_address[1]
        self.local = _is_local(address[0])

    def run(self) -> None:
        """Compute here and answer in threads, until an exception such as KeyboardInterrupt ends it."""
        listening = threading.Thread(target=self._http.serve_forever, args=(0.1,), daemon=True)
        listening.start()
        try:
            while True:
                try:
                    job = self.jobs.get(timeout=SIGNAL_S)
                except queue.Empty:
                    continue
                if not job.gone.is_set():
                    self._worker.work(job)
        finally:
            self._http.shutdown()
            self._http.server_close()


class _Http(ThreadingHTTPServer):
    """Connections, each in a thread, up to a number of them."""

    daemon_threads, block_on_close = True, False

    def __init__(self, server: Server, address: tuple[str, int]) -> None:
        self.quern = server
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            super().__init__(address, _Connection)
        except OSError as error:
            raise InputError(
                f"{address[0]}:{address[1]}: cannot be listened on: {error.strerror}. Give another --host or --port."
            ) from None

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread, or hang up on one connection too many."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The whole of a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away, and that is no error; anything else is one of ours and ends this connection alone."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError, socket.timeout)):
            _log(f"a connection ended in {type(error).__name__}: {error}")


class _Connection(BaseHTTPRequestHandler):
    """Requests of one client, one after the other."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "quern", ""
    timeout = SILENCE_S
    server: _Http

    def do_GET(self) -> None:
        """What the server is."""
        self._answer("GET")

    def do_POST(self) -> None:
        """Text."""
        self._answer("POST")

    def log_message(self, *args: Any) -> None:
        """Our own lines tell more."""

    def _answer(self, method: str) -> None:
        quern, path = self.server.quern, self.path.partition("?")[0]
        begun = time.perf_counter()
        try:
            self._check(method, path)
            if path == "/health":
                told = self._send(200, {"status": "ok"})
            elif path == "/v1/models":
                model = {"id": quern.model, "object": "model", "created": 0, "owned_by": "quern"}
                told = self._send(200, {"object": "list", "data": [{**model, "context_length": quern.context}]})
            else:
                told = self._complete(path)
        except Refused as refusal:
            told = self._refuse(refusal)
        if path != "/health":
            known = path if path in PATHS else "(another path)"
            _log(f"{method} {known} {told}, {time.perf_counter() - begun:.2f} s")

    def _check(self, method: str, path: str) -> None:
        """Raise Refused for what is not offered or not allowed."""
        quern = self.server.quern
        if path not in PATHS:
            raise self._unread(Refused(404, f"there are {', '.join(PATHS)} here, and nothing else."))
        if PATHS[path] != method:
            raise self._unread(Refused(405, f"{path} is for {PATHS[path]}."))
        if quern.key is not None:
            said = self.headers.get("Authorization", "")
            if path != "/health" and not hmac.compare_digest(said.encode(), f"Bearer {quern.key}".encode()):
                raise self._unread(Refused(401, "the API key is missing or wrong.", "authentication_error"))
        elif quern.local and not _is_local(_host(self.headers.get("Host", ""))):
            raise self._unread(Refused(403, "Host is no name of this machine. Ask for 127.0.0.1 or localhost."))

    def _unread(self, refusal: Refused) -> Refused:
        """The body of a refused request stays unread, so the connection cannot go on."""
        self.close_connection = True
        return refusal

    def _body(self) -> bytes:
        kind, length = self.headers.get_content_type(), self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise self._unread(Refused(411, "Content-Length is needed."))
        if len(length) > 9 or int(length) > MOST_BYTES:
            raise self._unread(Refused(413, f"the request is larger than {MOST_BYTES >> 20} MiB."))
        if kind != "application/json":
            raise self._unread(Refused(415, "Content-Type must be application/json."))
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionResetError("half a request")
        return body

    def _complete(self, path: str) -> str:
        """Read a request, have it computed, send what comes; gives a line for the log."""
        quern, body = self.server.quern, self._body()
        try:
            read = quern.reader.chat if path.endswith("chat/completions") else quern.reader.text
            asked = read(parse(body))
        except InputError as error:
            raise Refused.because(error) from None
        job = Job(asked)
        try:
            quern.jobs.put_nowait(job)
        except queue.Full:
            raise Refused(503, f"{MOST_WAITING} requests are waiting already. Try again later.", "overloaded") from None
        try:
            answer, events = Answer(quern.model, asked.chat), self._events(job)
            end = self._stream(answer, events, asked.usage) if asked.stream else self._whole(answer, events)
        finally:
            job.gone.set()
        used = end.usage
        return f"200: {used.prompt} tokens, {used.cached} of them cached, and {used.chosen} ({end.reason})"

    def _events(self, job: Job) -> Iterator[Union[str, End]]:
        """What comes of a job, while the client is there."""
        while True:
            try:
                event = job.events.get(timeout=LOOK_S)
            except queue.Empty:
                if self._has_left():
                    raise ConnectionResetError("the client went away") from None
                continue
            if isinstance(event, BaseException):
                raise Refused.because(event)
            yield event
            if isinstance(event, End):
                return

    def _has_left(self) -> bool:
        """Whether the client closed its end. One that sends the next request already has not."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _whole(self, answer: Answer, events: Iterator[Union[str, End]]) -> End:
        text: list[str] = []
        for event in events:
            if isinstance(event, End):
                self._send(200, answer.whole("".join(text), event.reason, event.usage))
                return event
            text.append(event)
        raise AssertionError("events end with an End")

    def _stream(self, answer: Answer, events: Iterator[Union[str, End]], usage: bool) -> End:
        """Server-sent events. Headers go out with the first, so that a refusal still has its status."""
        first = next(events)
        self.close_connection = True  # no length is known: the end of the connection is the end
        self.send_response(200)
        for name, value in (("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache")):
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if (opening := answer.first()) is not None:
            self._event(opening)
        event: Union[str, End] = first
        try:
            while not isinstance(event, End):
                self._event(answer.piece(event))
                event = next(events)
        except Refused as refusal:  # too late for a status
            self._event(_error(refusal))
            raise ConnectionAbortedError(str(refusal)) from None
        self._event(answer.last(event.reason))
        if usage:
            self._event(answer.counts(event.usage))
        self.wfile.write(b"data: [DONE]\n\n")
        return event

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

    def _refuse(self, refusal: Refused) -> str:
        return self._send(refusal.status, _error(refusal))

    def _send(self, status: int, data: dict[str, Any]) -> str:
        """One JSON object; gives what the log says of it."""
        body = json.dumps(data).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        return str(status) if status == 200 else f"{status}: {data['error']['message']}"


def _error(refusal: Refused) -> dict[str, Any]:
    return {"error": {"message": str(refusal), "type": refusal.kind, "param": None, "code": refusal.code}}


def _host(header: str) -> str:
    """The name in a Host header: without port, and without brackets."""
    name, bracket, _ = header.rpartition("]")
    return name.lstrip("[") if bracket else header.partition(":")[0]


def _is_local(name: str) -> bool:
    """Whether this names the machine itself to itself alone."""
    if name.lower().rstrip(".") == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return False


def _log(line: str) -> None:
    """A line with the time on stderr; what a client wrote is made printable."""
    printable = "".join(c if c.isprintable() else "?" for c in line[:500])
    with contextlib.suppress(OSError, AttributeError, ValueError):  # no stderr any more: nobody reads the log
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {printable}\n")
