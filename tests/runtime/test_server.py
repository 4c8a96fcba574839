"""The server of the toy bundle, asked over HTTP as programs ask it; and what its worker keeps between requests."""
from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import server
from runtime.chat import Part
from runtime.completions import Asked, Defaults, Usage
from runtime.errors import ContextFullError
from runtime.sampler import Sampling
from runtime.session import Chunk, Session
from runtime.tokenizer import Tokenizer
from runtime.worker import End, Job, Worker
from tests.runtime import tiny

ROOT = Path(__file__).parents[2]
PROMPT = "bcd"
ASKED = Asked((Part(PROMPT, False),), True, (), Sampling(), 6, (), stream=False, usage=False, chat=False)


# --- the worker ------------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(session: Session, toy: Path) -> Worker:
    return Worker(session, Tokenizer(toy / "tokenizer.json"))


def events(worker: Worker, asked: Asked, gone: bool = False) -> list[Any]:
    job = Job(asked)
    if gone:
        job.gone.set()
    worker.work(job)
    return [job.events.get_nowait() for _ in range(job.events.qsize())]


def test_a_growing_conversation_is_read_once(worker: Worker, session: Session) -> None:
    first, longer = tuple(range(2, 12)), (*range(2, 12), 5, 6)
    *text, end = events(worker, replace(ASKED, ids=first))
    assert end == End("length", Usage(10, 0, 6))
    assert events(worker, replace(ASKED, ids=first))[-1].usage.cached == 9  # the last is computed for its logits
    assert events(worker, replace(ASKED, ids=first))[:-1] == text
    *after, end = events(worker, replace(ASKED, ids=longer))
    assert end.usage.cached >= 10
    session.reset()
    assert events(Worker(session, worker._tokenizer), replace(ASKED, ids=longer))[:-1] == after
    assert events(worker, replace(ASKED, ids=(7, *first)))[-1].usage.cached == 0


def test_the_cache_is_what_the_worker_believes(worker: Worker, session: Session) -> None:
    """After every end: all said, stopped, left in the middle, refused."""
    ids = tuple(range(2, 12))
    for asked, gone in (
        (replace(ASKED, ids=ids), False),
        (replace(ASKED, ids=ids, stops=("e",)), False),
        (replace(ASKED, ids=ids), True),
        (replace(ASKED, ids=(*ids[:4], 99)), False),
    ):
        events(worker, asked, gone)
        held = worker._held
        assert session.position == len(held)
        assert np.array_equal(session.step(9), tiny.reference([*held, 9])[-1])
        session.rewind(len(held))


def test_who_leaves_during_a_long_prompt_ends_it_between_two_calls(
    worker: Worker, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, job, run = tuple(range(2, 12)) * 4, Job(ASKED), session._run
    calls = []

    def leave_in_the_second(chunk: Chunk, ids: Any) -> Any:
        calls.append(chunk.valid)
        if len(calls) == 2:
            job.gone.set()
        return run(chunk, ids)

    job.asked = replace(ASKED, ids=ids)
    monkeypatch.setattr(session, "_run", leave_in_the_second)
    worker.work(job)
    assert (calls, session.position, job.events.qsize()) == ([16, 16], 32, 0)
    monkeypatch.undo()
    assert events(worker, replace(ASKED, ids=ids))[-1] == End("length", Usage(40, 32, 6))  # what it had is kept
    assert np.array_equal(session.step(9), tiny.reference([*worker._held, 9])[-1])


def test_a_penalty_counts_what_was_cached(worker: Worker) -> None:
    asked = replace(ASKED, ids=tuple(range(2, 12)), sampling=Sampling(repetition_penalty=1.9))
    first = events(worker, asked)
    again = events(worker, asked)
    assert again[-1].usage.cached == 9
    assert first[:-1] == again[:-1]


def test_what_does_not_fit_is_an_event(worker: Worker) -> None:
    (error,) = events(worker, replace(ASKED, ids=(2,) * (tiny.CONTEXT + 1)))
    assert isinstance(error, ContextFullError)
    assert isinstance(events(worker, ASKED)[-1], End)


# --- over HTTP -------------------------------------------------------------------------------------------------------


@contextmanager
def serving(bundle: Path, *options: str, **environment: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """The port of a server in a process of its own, which an interrupt ends."""
    command = [sys.executable, "-m", "runtime", "serve", str(bundle), "--port", "0", "--threads", "1", *options]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            found = re.fullmatch(r"tiny: http://127\.0\.0\.1:([0-9]+)/v1\n", line)
            assert found, line
            yield int(found[1]), process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def port(toy: Path) -> Iterator[int]:
    with serving(toy, "--max-new-tokens", "6") as (found, _):
        yield found


def ask(port: int, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of one request on a connection of its own; None as body is a GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"} if data is not None else {}
    connection.request("GET" if data is None else "POST", path, data, {**kind, **headers})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if answer.getheader("Content-Type") == "application/json" else text.decode()


def generated(toy: Path, prompt: str, tokens: int) -> str:
    command = [sys.executable, "-m", "runtime", "generate", str(toy), "--prompt", prompt, "--json"]
    done = subprocess.run(
        [*command, "--max-new-tokens", str(tokens)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return str(json.loads(done.stdout)["text"])


def pieces(stream: str) -> list[Any]:
    """The JSON of every event but [DONE], which must be the last."""
    *found, done, nothing = stream.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in found]


def test_what_it_is(port: int) -> None:
    assert ask(port, "/health") == (200, {"status": "ok"})
    status, models = ask(port, "/v1/models")
    assert (status, [model["id"] for model in models["data"]]) == (200, ["tiny"])
    assert models["data"][0]["context_length"] == tiny.CONTEXT


def test_a_text_whole_and_in_pieces_is_generates(port: int, toy: Path) -> None:
    wanted = generated(toy, PROMPT, 6)
    status, whole = ask(port, "/v1/completions", {"prompt": PROMPT})
    (choice,) = whole["choices"]
    assert (status, choice["text"], choice["finish_reason"]) == (200, wanted, "length")
    assert whole["usage"]["completion_tokens"] == 6
    asked = {"prompt": PROMPT, "stream": True, "stream_options": {"include_usage": True}}
    *text, last, counts = pieces(ask(port, "/v1/completions", asked)[1])
    assert "".join(piece["choices"][0]["text"] for piece in text) == wanted
    assert [piece["choices"][0]["finish_reason"] for piece in [*text, last]] == [None] * len(text) + ["length"]
    assert counts["choices"] == []
    assert counts["usage"]["prompt_tokens_details"]["cached_tokens"] == counts["usage"]["prompt_tokens"] - 1


def test_a_chat(port: int) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 3}
    status, whole = ask(port, "/v1/chat/completions", asked)
    message = whole["choices"][0]["message"]
    assert (status, message["role"], whole["object"]) == (200, "assistant", "chat.completion")
    first, *text, last = pieces(ask(port, "/v1/chat/completions", {**asked, "stream": True})[1])
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in text) == message["content"]
    assert last["choices"][0]["delta"] == {}
    assert len({piece["id"] for piece in (first, *text, last)}) == 1


def test_many_at_once_each_get_their_own(port: int, toy: Path) -> None:
    prompts = ["ab", "cd", "efg", "h", "xyz"]
    wanted = [ask(port, "/v1/completions", {"prompt": prompt})[1]["choices"][0]["text"] for prompt in prompts]
    found: list[Any] = [None] * len(prompts)

    def one(i: int) -> None:
        found[i] = ask(port, "/v1/completions", {"prompt": prompts[i]})[1]["choices"][0]["text"]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == wanted


LARGE = str(server.MOST_BYTES + 1)
FULL = (
    "49 tokens do not fit into the context of 48, which holds 0 already. Use a shorter prompt, or rebuild the bundle "
    "with a longer context (python -m compiler build --context)."
)


@pytest.mark.parametrize(("path", "body", "headers", "status", "message"), [
    ("/", None, {}, 404,
     "there are /v1/chat/completions, /v1/completions, /v1/models, /health here, and nothing else."),
    ("/v1/completions", None, {}, 405, "/v1/completions is for POST."),
    ("/health", {}, {}, 405, "/health is for GET."),
    ("/v1/completions", b"", {"Content-Length": "x"}, 411, "Content-Length is needed."),
    ("/v1/completions", b"", {"Content-Length": LARGE}, 413, "the request is larger than 8 MiB."),
    ("/v1/completions", {}, {"Content-Type": "text/plain"}, 415, "Content-Type must be application/json."),
    ("/v1/completions", {}, {"Host": "evil.example:80"}, 403,
     "Host is no name of this machine. Ask for 127.0.0.1 or localhost."),
    ("/v1/completions", b"[", {}, 400, "the request is not JSON: Expecting value: line 1 column 2 (char 1)."),
    ("/v1/completions", {"prompt": 5}, {}, 400, "prompt is 5, but must be a text or a list of token ids."),
    ("/v1/completions", {"prompt": [99]}, {}, 400, "token id 99 is outside the vocabulary 0..31."),
    ("/v1/completions", {"prompt": [10**19]}, {}, 400,
     "token id 10000000000000000000 is outside the vocabulary 0..31."),
    ("/v1/completions", {"prompt": [2] * 49}, {}, 400, FULL),
    ("/v1/completions", {"prompt": [2] * 49, "stream": True}, {}, 400, FULL),
    ("/v1/completions", b'{"prompt": "\\ud800"}', {}, 400,
     "the prompt is not valid UTF-8. Check the encoding of the terminal or file."),
])  # fmt: skip
def test_refused(port: int, path: str, body: Any, headers: dict[str, str], status: int, message: str) -> None:
    found, answer = ask(port, path, body, **headers)
    assert (found, answer["error"]["message"]) == (status, message)
    assert answer["error"]["code"] == ("context_length_exceeded" if message == FULL else None)


def test_a_connection_is_kept(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for _ in range(3):
        connection.request("POST", "/v1/completions", b'{"prompt": "ab"}', {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, answer.will_close) == (200, False)
        answer.read()
    connection.close()


def test_garbage_and_half_a_request_end_their_connection_alone(port: int) -> None:
    for sent in (b"\x16\x03\x01\x02garbage\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert ask(port, "/health") == (200, {"status": "ok"})


def test_a_key(toy: Path) -> None:
    with serving(toy, QUERN_API_KEY="s3cret") as (port, _):
        asked = {"prompt": "ab", "max_tokens": 1}
        status, answer = ask(port, "/v1/completions", asked)
        assert (status, answer["error"]["message"]) == (401, "the API key is missing or wrong.")
        assert ask(port, "/v1/completions", asked, Authorization="Bearer s3cre")[0] == 401
        assert ask(port, "/v1/completions", asked, Authorization="Bearer s3cret")[0] == 200
        assert ask(port, "/health")[0] == 200


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_ends_when_told(toy: Path, number: int, code: int) -> None:
    with serving(toy) as (port, process):
        assert ask(port, "/v1/completions", {"prompt": "ab"})[0] == 200
        process.send_signal(number)
        _, log = process.communicate(timeout=30)
        assert process.returncode == code
        assert "Traceback" not in log
        line = r"^[0-9:]{8} POST /v1/completions 200: [0-9]+ tokens, 0 of them cached, and "
        assert re.search(line, log, re.MULTILINE)


SIGNALLED = """
import signal, sys, threading, time
from runtime import server
from runtime.__main__ import main

def signal_this_thread(self, *rest):
    threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)).start()

server._Http.serve_forever = signal_this_thread
server._Http.shutdown = lambda self: None
sys.exit(main(["serve", sys.argv[1], "--port", "0", "--threads", "1"]))
"""


def test_it_ends_when_another_thread_was_told(toy: Path) -> None:
    """What the kernel gives to another thread, or just before a wait, interrupts no wait of the main thread."""
    done = subprocess.run([sys.executable, "-c", SIGNALLED, str(toy)], cwd=ROOT, timeout=30, check=False)
    assert done.returncode == 128 + signal.SIGTERM


def test_a_port_that_is_taken(port: int, toy: Path) -> None:
    command = [sys.executable, "-m", "runtime", "serve", str(toy), "--port", str(port)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    message = f"127.0.0.1:{port}: cannot be listened on: Address already in use. Give another --host or --port."
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


# --- without a model: connections that wait --------------------------------------------------------------------------


def test_who_goes_away_is_noticed(session: Session, toy: Path) -> None:
    """Whole answers, too, where nothing is written before the end."""
    made = server.Server(session, Tokenizer(toy / "tokenizer.json"), Defaults(Sampling(), 6), ("127.0.0.1", 0))
    listening = threading.Thread(target=made._http.serve_forever, args=(0.05,), daemon=True)
    listening.start()
    try:
        body = b'{"prompt": "ab"}'
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", made.port), timeout=30) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            job = made.jobs.get(timeout=30)
            assert not job.gone.wait(2 * server.LOOK_S)
        assert job.gone.wait(30)
    finally:
        made._http.shutdown()
        made._http.server_close()


def test_more_than_can_wait(session: Session, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_WAITING", 1)
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 2)
    made = server.Server(session, Tokenizer(toy / "tokenizer.json"), Defaults(Sampling(), 6), ("127.0.0.1", 0))
    threading.Thread(target=made._http.serve_forever, args=(0.05,), daemon=True).start()
    try:
        waiting = http.client.HTTPConnection("127.0.0.1", made.port, timeout=30)
        waiting.request("POST", "/v1/completions", b'{"prompt": "ab"}', {"Content-Type": "application/json"})
        while made.jobs.empty():
            time.sleep(0.01)
        status, answer = ask(made.port, "/v1/completions", {"prompt": "ab"})
        assert (status, answer["error"]["type"]) == (503, "overloaded")
        idle = _taken(made.port)
        third = socket.create_connection(("127.0.0.1", made.port), timeout=30)
        assert third.recv(1) == b""  # hung up on
        for connection in (waiting, idle, third):
            connection.close()
    finally:
        made._http.shutdown()
        made._http.server_close()


def _taken(port: int) -> socket.socket:
    """A connection that is not hung up on: the one before it is done with a moment after its answer."""
    while True:
        connection = socket.create_connection(("127.0.0.1", port), timeout=0.5)
        try:
            connection.recv(1)
        except TimeoutError:
            return connection
        connection.close()
