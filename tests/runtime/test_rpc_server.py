"""A board's server, with TVM's own tracker and client: sessions, their ends, strangers, a tracker that left."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.__main__ import main
from runtime.rpc_server import exception
from runtime.rpc_session import PROTOCOL
from runtime.rpc_tracker import Address, Offer, Tracker, TrackerError
from tests.waiting import wait_for

tvm = pytest.importorskip("tvm")
REPO = Path(__file__).parents[2]
KEY, PATIENCE_S = "mill", 30


TRACKER = """
import os, signal, sys
from tvm.rpc.tracker import PopenTrackerServerState
child, port = 0, int(sys.argv[1])
for line in sys.stdin:
    if child:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    child = os.fork() if line == "start\\n" else 0
    if line == "start\\n" and child == 0:
        PopenTrackerServerState("127.0.0.1", port, port + 1, silent=True).thread.join()
"""


@contextmanager
def tracker(port: int) -> Iterator[Callable[[str], None]]:
    """TVM's tracker on that port, when it is told to start, until it is told to stop."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRACKER, str(port)], cwd=REPO, stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None

    def tell(what: str) -> None:
        assert process.stdin is not None
        process.stdin.write(f"{what}\n")
        process.stdin.flush()

    try:
        yield tell
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def place() -> Iterator[Address]:
    port = free_port()
    with tracker(port) as tell:
        tell("start")
        wait_for(lambda: connects(port))
        yield Address("127.0.0.1", port)


@contextmanager
def server(address: Address, log: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The verb, as a process in a hurry."""
    code = (
        "import sys; from runtime import rpc_server; rpc_server.PERIOD_S, rpc_server.UNUSED_S = 0.1, 0.3; "
        "from runtime.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "rpc-server", "--tracker", str(address), "--key", KEY, "--port", "0"]
    with log.open("a") as file:
        process = subprocess.Popen([*command, *options], cwd=REPO, stderr=file, text=True)
    try:
        yield process
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) in (143, -9)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def said(log: Path, what: str, count: int) -> None:
    """Wait until the server has said something that often."""
    wait_for(lambda: log.read_text().count(what) == count)


def lent(address: Address) -> Offer:
    """The board, as the tracker lends it."""
    connection = Tracker(address)
    try:
        found = connection.request(KEY, PATIENCE_S)
    finally:
        connection.close()
    assert found is not None and found.host == "127.0.0.1"
    return found


def session(address: Address, timeout_s: int = 0) -> Any:
    """Of TVM's client."""
    offer = lent(address)
    return tvm.rpc.connect(offer.host, offer.port, f"{offer.match_key} -threads=1", timeout_s)


def close(client: Any) -> None:
    client.get_function("CloseRPCConnection")()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """double(a f32[8], b f32[8]): b = 2 a; spin(b f32[8]) takes forever; crash(b f32[8]) writes to nowhere."""
    source = tmp_path_factory.mktemp("library") / "code.c"
    source.write_text(
        "typedef struct { int type; unsigned pad; struct { float *data; } *tensor; } value;\n"
        "int __tvm_ffi_double(void *s, const value *a, int n, void *r)\n"
        "{ for (int i = 0; i < 8; ++i) a[1].tensor->data[i] = 2 * a[0].tensor->data[i]; return 0; }\n"
        "int __tvm_ffi_spin(void *s, const value *a, int n, void *r)\n"
        "{ for (volatile int i = 0;; ) ++i; return 0; }\n"
        "int __tvm_ffi_crash(void *s, const value *a, int n, void *r) { __builtin_trap(); }\n"
    )
    made = source.with_name("code.so")
    subprocess.run(
        [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC", "-O1", "-o", made, source], check=True, timeout=300
    )
    return made


def test_any_client_of_tvm_is_served(place: Address, log: Path, library: Path, tmp_path: Path) -> None:
    with server(place, log) as process:
        client = session(place)
        about = json.loads(client.get_function("quern.about")())
        assert (about["protocol"], about["threads"], about["emulator"]) == (PROTOCOL, 1, None)
        client.upload(bytearray(library.read_bytes()), "code.so")
        module = client.load_module("code.so")
        a = tvm.runtime.tensor(np.arange(8, dtype="float32"), client.cpu(0))
        b = tvm.runtime.tensor(np.zeros(8, "float32"), client.cpu(0))
        module["double"](a, b)
        assert b.numpy().tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
        (child,) = children(process.pid)
        folder = Path(f"/proc/{child}/cwd").resolve()
        assert (folder / "code.so").is_file()
        for name in ("../away", "/etc/passwd", "a/../../b"):
            with pytest.raises(tvm.error.RPCError, match=r"is no name of a file for this session"):
                client.upload(bytearray(b"x"), name)
        close(client)
        wait_for(lambda: not folder.exists())
        close(session(place))  # it is offered again
    text = log.read_text()
    assert f"is offered as {KEY} by the tracker at {place}\n" in text and "a client came\n" in text


def test_what_ends_a_session_is_told(place: Address, log: Path, library: Path) -> None:
    with server(place, log):
        client = session(place)
        client.upload(bytearray(library.read_bytes()), "code.so")
        b = tvm.runtime.tensor(np.zeros(8, "float32"), client.cpu(0))
        with pytest.raises(tvm.error.RPCError, match=r"quern: the session ended: signal (4|5), "):
            client.load_module("code.so")["crash"](b)
        client = session(place, timeout_s=1)
        time.sleep(1.5)
        with pytest.raises(tvm.error.RPCError, match="quern: the session ended: its time limit of 1 s has passed"):
            client.get_function("quern.about")()
        close(session(place))


def test_a_session_dies_with_its_client(place: Address, log: Path, library: Path) -> None:
    """A client that is killed while its kernel runs forever."""
    code = f"""
import os, sys, numpy, tvm
from tests.runtime.test_rpc_server import session
from runtime.rpc_tracker import Address
client = session(Address("127.0.0.1", {place.port}))
client.upload(bytearray(open({str(library)!r}, "rb").read()), "code.so")
spin = client.load_module("code.so")["spin"]
b = tvm.runtime.tensor(numpy.zeros(8, "float32"), client.cpu(0))
print("spinning", flush=True)
spin(b)
"""
    with server(place, log) as process:
        client = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True)
        assert client.stdout is not None and client.stdout.readline() == "spinning\n"
        (child,) = children(process.pid)
        time.sleep(0.3)
        client.kill()
        client.communicate()
        wait_for(lambda: not Path(f"/proc/{child}").exists())
        close(session(place))


def test_a_session_dies_with_its_server(place: Address, log: Path) -> None:
    with server(place, log) as process:
        client = session(place)
        (child,) = children(process.pid)
        process.kill()
        wait_for(lambda: not Path(f"/proc/{child}").exists())
        with pytest.raises(tvm.error.InternalError):
            client.get_function("quern.about")()


def test_strangers_are_sent_away(place: Address, log: Path) -> None:
    with server(place, log):
        offer = lent(place)
        with socket.create_connection((offer.host, offer.port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with suppress(ConnectionResetError):
                assert stranger.recv(4) == b""
        with pytest.raises(tvm.error.InternalError, match="cannot find server that matches key"):
            tvm.rpc.connect(offer.host, offer.port, f"{KEY}:0.5")
        close(tvm.rpc.connect(offer.host, offer.port, offer.match_key))
    assert "a stranger was sent away: no client of TVM\n" in log.read_text()


def test_a_client_that_never_comes(place: Address, log: Path) -> None:
    with server(place, log):
        first = lent(place)
        second = lent(place)  # the board has noticed
    assert first.match_key != second.match_key and first.port == second.port


def test_it_comes_back_to_a_tracker_that_was_started_again(log: Path) -> None:
    address = Address("127.0.0.1", free_port())
    with tracker(address.port) as tell, server(address, log):
        said(log, "trying until there is one", 1)
        for life in (1, 2):
            tell("start")
            said(log, "is offered", 2 * life - 1)
            close(session(address))
            said(log, "is offered", 2 * life)
            tell("stop")
            said(log, "the tracker is gone", life)


def test_a_tunnels_server_ends_with_its_stdin(place: Address, log: Path) -> None:
    command = [sys.executable, "-m", "runtime", "rpc-server", "--tracker", str(place), "--key", KEY, "--port", "0"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--tunnel"], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
        )
    assert process.stdin is not None and process.stdout is not None
    port = json.loads(process.stdout.readline())["port"]
    process.stdin.write("127.0.0.1:4321\n")
    process.stdin.flush()
    assert lent(place).port == 4321
    assert connects(port)
    process.stdin.close()
    assert process.wait(PATIENCE_S) == 0
    process.stdout.close()


def test_an_open_port_is_warned_of(place: Address, log: Path) -> None:
    with server(place, log, "--bind", "0.0.0.0"):
        wait_for(lambda: "is offered" in log.read_text())
        assert lent(place).host == "127.0.0.1"  # as the tracker sees it
    first = log.read_text().splitlines()[0]
    port = first.split(" ")[4].rpartition(":")[2]
    assert first == (
        f"rpc-server: warning: whoever reaches 0.0.0.0:{port} may run programs as this user. Use this in a network "
        f"that you trust, or leave --bind out and use an SSH tunnel."
    )


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["rpc-server", "--tracker", "127.0.0.1:1", "--key", KEY, "--port", str(port)]
        before = signal.getsignal(signal.SIGTERM)
        try:
            assert main(arguments) == 2
        finally:
            signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == (
        f"error: 127.0.0.1:{port}: cannot be listened on: Address already in use. Give another --port (0: any that is "
        f"free), or an address of this machine to --bind.\n"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--threads", "0"], "threads is 0, but must lie in 1..1024."),
        (["--limit", "nan"], "limit is nan s, but must be more than 0."),
        (["--bind", "no.such.host.invalid"],
         "no.such.host.invalid:9090: cannot be listened on: Name or service not known. Give another --port (0: any "
         "that is free), or an address of this machine to --bind."),
    ],
)  # fmt: skip
def test_options_that_cannot_be(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["rpc-server", "--tracker", "127.0.0.1:1", "--key", KEY, *options]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tracker", "pi", "--key", "a"], "argument --tracker: 'pi' is not HOST:PORT"),
        (["--tracker", "pi:0", "--key", "a"], "argument --tracker: 'pi:0' is not HOST:PORT"),
        (["--tracker", "pi:1", "--key", "a:b"], "argument --key: 'a:b' is no name without spaces and colons"),
        (["--tracker", "pi:1", "--key", "a", "--port", "70000"], "argument --port: '70000' is not a port: 0 to 65535"),
    ],
)
def test_options_that_are_none(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["rpc-server", *options])
    help_ = "For what there is: python -m runtime rpc-server --help"
    assert capsys.readouterr().err == f"error: {said}. {help_}\n"


def test_an_address_with_colons() -> None:
    assert Address.parse("[::1]:9190") == ("::1", 9190)
    assert str(Address.parse("[::1]:9190")) == "[::1]:9190"


@pytest.mark.parametrize(
    ("sent", "said"),
    [(b"HTTP", "is no TVM tracker"), (b"\x71\xf2\x02\x00\xff\xff\xff\x7f", "sent something that is no message"),
     (b"\x71\xf2\x02\x00\x02\x00\x00\x00{]", "sent something that is no JSON"),
     (b"\x71\xf2\x02\x00\x01\x00\x00\x007", "gave no summary"), (b"\x71\xf2", "closed the connection")],
)  # fmt: skip
def test_what_is_no_tracker(sent: bytes, said: str) -> None:
    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4)
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(100)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match=said) as caught, closing(Tracker(Address(*listener.getsockname()))) as made:
            made.summary()
        thread.join()
    assert isinstance(caught.value, TrackerError | ConnectionResetError)


def test_an_exception_by_hand() -> None:  # u64 size; i32 kException, one argument, a C string; its u64 length
    assert exception("no") == struct.pack("<Qiii", 22, 5, 1, 8) + struct.pack("<Q", 2) + b"no"
