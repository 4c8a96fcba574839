"""An SSH connection to a device: whom it trusts, and small POSIX shell scripts that run there.

Everything goes through `sh` and core tools: a board needs an SSH server, no SFTP and no Python, to be looked at.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh

from compiler.errors import UserError

CONNECT_S, KEEPALIVE_S = 20.0, 15.0
DEFAULT_FOLDER = "quern"  # below the user's home on the device
_PLACE = re.compile(r"(?:(?P<user>[^@:/\s]+)@)?(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^@:/\[\]\s]+)(?::(?P<folder>.*))?")
LOST = (asyncssh.ConnectionLost, asyncssh.DisconnectError, asyncssh.ChannelOpenError, OSError)


class DeployError(UserError):
    """The device cannot be reached, is not trusted, does not fit the bundle, or something failed there."""


@dataclass(frozen=True)
class Place:
    """[user@]host[:folder]: a folder that does not begin with / lies in the user's home there."""

    user: str | None
    host: str
    folder: str

    def __str__(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host


def parse_place(text: str) -> Place:
    """As scp spells it; an IPv6 address stands in brackets. Raises DeployError."""
    found = _PLACE.fullmatch(text)
    if found is None or found["host"].startswith("-"):
        raise DeployError(f"{text!r} is no device. Write user@host or user@host:folder, such as pi@raspberrypi:story.")
    folder = (found["folder"] or DEFAULT_FOLDER).removeprefix("~/").rstrip("/")
    if not folder or folder == "~" or not folder.isprintable():
        raise DeployError(f"{text!r}: bundles need a folder of their own on the device, such as pi@raspberrypi:story.")
    return Place(found["user"], found["host"].strip("[]"), folder if folder.startswith("/") else f"./{folder}")


@dataclass
class Remote:
    """A trusted, open connection. `name` opens every message; `folder` is the one of the bundle there."""

    name: str
    folder: str
    connection: asyncssh.SSHClientConnection

    async def output(self, script: str, *arguments: str) -> str:
        """Run a script with $1, $2, ...; its stdout. Raises DeployError with its last line of stderr when it fails."""
        async with self.process(script, *arguments, stdin=asyncssh.DEVNULL) as process:
            out, err = await process.communicate()
            self.check(process, err)
        return bytes(out).decode(errors="replace")

    @asynccontextmanager
    async def process(
        self, script: str, *arguments: str, **how: Any
    ) -> AsyncIterator[asyncssh.SSHClientProcess[bytes]]:
        """A script that runs there, its streams as bytes. A connection that breaks inside is a DeployError."""
        command = shlex.join(["sh", "-c", script, "sh", *arguments])
        try:
            async with self.connection.create_process(command, encoding=None, **how) as process:
                yield process
        except LOST as error:
            raise self.lost(error) from None

    def check(self, process: asyncssh.SSHClientProcess[bytes], stderr: Any) -> None:
        """Raise DeployError unless the process ended well."""
        if process.exit_status is None and process.exit_signal is None:
            raise self.lost(None)
        if process.exit_status != 0:
            said = bytes(stderr or b"").decode(errors="replace").strip().splitlines()
            why = said[-1].removeprefix("error: ").rstrip(".") if said else f"a command failed ({process.exit_status})"
            raise DeployError(f"{self.name}: {why}.")

    def lost(self, error: Exception | None) -> DeployError:
        """What a broken connection is to the user."""
        why = f" ({error})" if error is not None and str(error) else ""
        return DeployError(
            f"{self.name}: the connection was lost{why}. What was copied stays there: run the same command again, it "
            f"goes on where this one stopped."
        )


@asynccontextmanager
async def connect(place: Place, port: int | None, identity: Path | None) -> AsyncIterator[Remote]:
    """Connect as `ssh` would: ~/.ssh/config, known_hosts, agent and key files; `identity` is used alone when given.

    No password is asked for and no host key is accepted that known_hosts does not have. Raises DeployError.
    """
    if identity is not None and not identity.is_file():
        raise DeployError(
            f"--identity {identity}: there is no such file. Give a private key, such as ~/.ssh/id_ed25519."
        )
    trust = _Trust()
    options: dict[str, Any] = {"port": port} if port is not None else {}
    options |= {"username": place.user} if place.user else {}
    options |= {"client_keys": [str(identity)], "agent_path": None} if identity is not None else {}
    try:
        connection = await asyncssh.connect(
            place.host,
            client_factory=lambda: trust,
            connect_timeout=CONNECT_S,
            login_timeout=CONNECT_S,
            keepalive_interval=KEEPALIVE_S,
            compression_algs=["none"],  # weights do not compress
            preferred_auth="publickey",
            **options,
        )
    except asyncssh.HostKeyNotVerifiable as error:
        raise trust.refusal(place, error) from None
    except asyncssh.PermissionDenied:
        raise DeployError(
            f"{place}: no key is accepted there. Allow yours with `ssh-copy-id {place}`, start an agent that has it "
            f"(ssh-add), or name it with --identity."
        ) from None
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
        raise DeployError(
            f"{identity or place}: the key cannot be used: {error}. A key with a passphrase must be in an agent "
            f"(ssh-add); leave --identity out then."
        ) from None
    except asyncssh.ConfigParseError as error:
        raise DeployError(f"~/.ssh/config cannot be read: {error}.") from None
    except (OSError, asyncssh.Error) as error:
        number = getattr(error, "errno", None) or 0  # asyncio has words of its own for them; names have negative ones
        said = os.strerror(number) if number > 0 else getattr(error, "strerror", None)
        why = said or str(error) or f"no answer in {CONNECT_S:.0f} s"
        raise DeployError(
            f"{place}: cannot be reached: {why}. Is it on, does its SSH server run, are --port and the name right?"
        ) from None
    async with connection:
        yield Remote(str(place), place.folder, connection)


class _Trust(asyncssh.SSHClient):
    """Accepts no key by itself; remembers the one that known_hosts did not vouch for."""

    def __init__(self) -> None:
        self._key: asyncssh.SSHKey | None = None
        self._at = ("", 22)
        self._connection: Any = None

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        self._connection = conn

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Asked only for a key that known_hosts does not have."""
        self._key, self._at = key, (host, port)
        return False

    def refusal(self, place: Place, error: Exception) -> DeployError:
        """Unknown, changed or revoked."""
        if self._key is None:
            return DeployError(f"{place}: its host key is refused: {error}. Look into ~/.ssh/known_hosts.")
        host, port = self._at
        entry = host if port == 22 else f"[{host}]:{port}"
        login = f"ssh{'' if port == 22 else f' -p {port}'} {place}"
        shown = f"{self._key.get_algorithm()} {self._key.get_fingerprint()}"
        # The connection keeps the keys that known_hosts had for this host; any of them means that the key changed.
        if getattr(self._connection, "_trusted_host_keys", None):
            return DeployError(
                f"{place}: its host key is not the one in known_hosts: it shows {shown}. Somebody may be in between, "
                f"or the device was set up anew. If you know that it was, remove the old key with "
                f"`ssh-keygen -R {shlex.quote(entry)}`, log in once with `{login}`, and compare the fingerprint."
            )
        return DeployError(
            f"{place}: its host key is unknown: {shown}. Compare that with what `ssh-keygen -lf "
            f"/etc/ssh/ssh_host_ed25519_key.pub` prints on the device itself, and log in once with `{login}` to add it "
            f"to known_hosts."
        )
