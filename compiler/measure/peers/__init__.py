"""Other engines to measure beside quern: one file a peer, found by its name. Each lives in an environment of its own.

A peer's file has NAME (what --against takes), VARIANTS (name -> what it is; the first is the default), and

    missing(place, variant) -> str | None      what is not installed yet, or None
    install(place, variant, say)               download, build; `say` takes lines for the user
    opened(place, variant, model, threads)     a context manager that gives a Side
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from compiler.errors import UserError

Say = Callable[[str], None]


class Side(Protocol):
    """One engine with one model in one number of threads, ready to be timed. Speeds are tokens/s."""

    @property
    def name(self) -> str:
        """What a table calls it."""

    @property
    def about(self) -> dict[str, object]:
        """Version, build, type of the weights: what a record must say."""

    @property
    def threads(self) -> int:
        """Threads that it computes in."""

    def prefill(self, tokens: int) -> float:
        """A prompt of `tokens` from an empty context."""

    def decode(self, context: int, tokens: int) -> float:
        """`tokens` tokens one by one, after `context` others."""

    def perplexity(self, windows: list[list[int]]) -> float:
        """Of windows of ids, the second half of each scored. UnsupportedError where the engine cannot say."""


@dataclass(frozen=True)
class PeerModel:
    """What a peer has to run: config.json's keys, bits, inputs a scale, and the checkpoint, or None: random weights."""

    config: Mapping[str, Any]
    bits: int
    group_size: int
    head_bits: int
    checkpoint: Path | None = None


class Peer(Protocol):
    """A peer's file as a module."""

    NAME: str
    VARIANTS: Mapping[str, str]

    def missing(self, place: Path, variant: str) -> str | None:
        """What is not installed yet."""

    def install(self, place: Path, variant: str, say: Say) -> None:
        """Install it below `place`."""

    def opened(self, place: Path, variant: str, model: PeerModel, threads: int) -> AbstractContextManager[Side]:
        """The engine with the model."""


def names() -> dict[str, str]:
    """What --against takes -> module name."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = cast(Peer, importlib.import_module(f"{__name__}.{info.name}"))
        found[module.NAME] = f"{__name__}.{info.name}"
    return found


def find(text: str) -> tuple[Peer, str]:
    """A peer and its variant from NAME or NAME:VARIANT. Raises UserError for unknown ones."""
    name, _, variant = text.partition(":")
    known = names()
    if name not in known:
        raise UserError(f"--against {text}: there is no peer {name!r}. Known peers: {', '.join(known)}.")
    peer = cast(Peer, importlib.import_module(known[name]))
    variant = variant or next(iter(peer.VARIANTS))
    if variant not in peer.VARIANTS:
        raise UserError(
            f"--against {text}: {name} has no variant {variant!r}. Known: {', '.join(peer.VARIANTS)}."
        )  # fmt: skip
    return peer, variant


def place(given: Path | None) -> Path:
    """The folder of all peers: as given, or quern/peers in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (given or cache / "quern" / "peers").absolute()


def require(peer: Peer, folder: Path, variant: str, install: bool, say: Say) -> None:
    """Install what is missing when that was asked for, else say how. Raises UserError."""
    if (missing := peer.missing(folder, variant)) is None:
        return
    if not install:
        raise UserError(
            f"{peer.NAME} ({peer.VARIANTS[variant]}) is not installed: {missing} is not in {folder}. Run the same "
            f"command with --install-peers: it goes into an environment of its own there and touches nothing else."
        )
    folder.mkdir(parents=True, exist_ok=True)
    peer.install(folder, variant, say)
    if (missing := peer.missing(folder, variant)) is not None:
        raise UserError(f"{peer.NAME}: was installed, but {missing} is not in {folder}. Remove that and try again.")


def environment(folder: Path, packages: list[str], say: Say) -> Path:
    """A virtual environment with these packages; gives its Python. Complete ones are left alone."""
    python, done = folder / "bin" / "python", folder / "packages.txt"
    wanted = "\n".join(packages)
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return python
    say(f"environment {folder}: {', '.join(packages)}")
    run([sys.executable, "-m", "venv", str(folder)])
    run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", *packages])
    done.write_text(wanted, encoding="utf-8")
    return python


def run(command: list[str], both: bool = False) -> str:
    """What a command prints to stdout, or to stdout and stderr; UserError with its last lines when it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-12:]
        raise UserError("\n".join([f"{' '.join(command)} failed with status {done.returncode}:", *last]))
    return done.stdout + done.stderr if both else done.stdout
