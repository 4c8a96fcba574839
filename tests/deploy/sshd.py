"""A real OpenSSH server on loopback, as the current user, with keys and a configuration of its own."""
from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
SetEnv HOME={folder} PATH={path}{more}
"""


@dataclass
class Server:
    """home: what HOME is for the client; its .ssh/known_hosts trusts the server."""

    port: int
    home: Path
    key: Path

    def trust(self, port: int, key: Path | None = None) -> None:
        """Write known_hosts: `key`, by default the server's, for that port; nothing else."""
        public = (key or self.home / "host_key").with_suffix(".pub").read_text()
        (self.home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}")


def keygen(path: Path) -> None:
    """An ed25519 key pair without a passphrase."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


@contextmanager
def serve(
    folder: Path, programs: Path | None = None, environment: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Server]:
    """Start it, wait until it answers, end it. `programs` come first on the PATH there; else this Python does.

    environment: variables that sessions have besides, without blanks in them.
    """
    assert SSHD is not None
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # as root, sshd insists on it
    (folder / ".ssh").mkdir(mode=0o700)
    keygen(folder / "host_key")
    keygen(folder / "user_key")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = folder / "sshd_config"
    path = f"{programs or Path(sys.executable).parent}:/usr/bin:/bin"
    more = "".join(f" {name}={value}" for name, value in environment.items())
    config.write_text(CONFIG.format(port=port, folder=folder, path=path, more=more))
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", config], stderr=log)
    try:
        for _ in range(100):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        made = Server(port, folder, folder / "user_key")
        made.trust(port)
        yield made
    finally:
        server.terminate()
        server.wait()


@contextmanager
def cut_after(port: int, limit: int) -> Iterator[int]:
    """A port that leads to `port` and is cut for good once the client has sent `limit` bytes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pass_on(source: socket.socket, sink: socket.socket, left: int) -> None:
        with suppress(OSError):
            while left > 0 and (data := source.recv(min(65536, left))):
                sink.sendall(data)
                left -= len(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve_one() -> None:
        with suppress(OSError):
            client, _ = listener.accept()
            with client, socket.create_connection(("127.0.0.1", port)) as server:
                back = threading.Thread(target=pass_on, args=(server, client, 1 << 40))
                back.start()
                pass_on(client, server, limit)
                back.join()

    thread = threading.Thread(target=serve_one)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
        thread.join(10)
