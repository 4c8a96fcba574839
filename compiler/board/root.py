"""The arm64 root of the emulated board: Python, numpy, tokenizers and TVM's runtime, fetched once and kept.

Debian's packages and PyPI's aarch64 wheels come as this machine's apt and pip are set up; neither root rights nor
binfmt are needed. It lies under `cache_dir()`. A self-contained bundle uses nothing of it but Python.

ROOT/python3 is the board's Python as a program of this machine: it starts qemu. The board's sys.executable names it, so
a program on the board can start another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from compiler.codegen.link import cache_dir
from compiler.errors import UserError

QEMU, CPU = "qemu-aarch64", "cortex-a72"
RECIPE = 2  # raise it when the steps below change what a root holds
# Program -> the Debian package that has it.
TOOLS = {QEMU: "qemu-user", "apt-get": "apt", "dpkg": "dpkg"}
DEBIAN = ("python3", "libstdc++6")  # apt adds what these need
# wheel -> what to keep of it; all of TVM would be 240 MB of compiler
WHEELS = {
    "numpy": ("numpy/", "numpy.libs/"),
    "tokenizers": ("tokenizers/",),
    "apache-tvm-ffi": ("tvm_ffi/",),
    "typing-extensions": ("typing_extensions.py",),  # tvm_ffi's own need
    "apache-tvm": ("tvm/lib/libtvm_runtime.so",),
}
GLIBC_MINORS = range(28, 16, -1)  # manylinux tags up to the floor of the aarch64 targets, glibc 2.28
# What Linux says on a Raspberry Pi 4. qemu 7.2 would show the host's file; with -L it looks under the root first.
CPUINFO = "\n".join(
    f"processor\t: {core}\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU implementer\t: 0x41\n"
    "CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n"
    for core in range(4)
)
START = """#!/bin/sh
exec {qemu} -0 "$0" -cpu {cpu} -L {root} {python} -S "$@"
"""


class BoardError(UserError):
    """The emulated board cannot be had here, or what ran on it failed: what was run, and what it said."""


def missing_tools() -> list[str]:
    """Programs that the board needs and this machine lacks."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def require_tools() -> None:
    """Raise BoardError when a program is missing."""
    if missing := missing_tools():
        hint = (
            f"apt-get install {' '.join(TOOLS[tool] for tool in missing)}."
            if shutil.which("apt-get")
            else "it fetches Debian's arm64 packages with apt-get, so it needs Debian or Ubuntu here."
        )
        raise BoardError(f"--board qemu needs {', '.join(missing)}, which this machine lacks: {hint}")


@functools.cache
def root(tell: Callable[[str], object] | None = None) -> Path:
    """The arm64 root, made now if there is none. Two processes that need it make it once: the second one waits.

    tell: gets a line before the minute that this takes. Raises BoardError.
    """
    require_tools()
    wheels = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
    recipe = repr((RECIPE, DEBIAN, wheels, WHEELS, CPUINFO, START))
    top = cache_dir() / f"arm64-root-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    cache_dir().mkdir(parents=True, exist_ok=True)
    with _lock(cache_dir() / "arm64-root.lock"):
        if not top.is_dir():
            if tell is not None:
                tell(f"Making an arm64 root in {top}: 80 MB of packages, once")
            with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="arm64-making-") as scratch:
                _make(Path(scratch), wheels, top).rename(top)
    return top


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(scratch: Path, wheels: list[str], place: Path) -> Path:
    """A root in `scratch` that will lie at `place`."""
    top = scratch / "root"
    _unpack_debian(scratch / "apt", top)
    python = (top / "usr/bin/python3").resolve().relative_to(top.resolve())
    _unpack_wheels(scratch / "wheels", top / "site", python.name.removeprefix("python"), wheels)
    (top / "proc").mkdir()
    (top / "proc/cpuinfo").write_text(CPUINFO)
    there = {"root": shlex.quote(str(place)), "python": shlex.quote(str(place / python))}
    (top / "python3").write_text(START.format(qemu=QEMU, cpu=CPU, **there))
    (top / "python3").chmod(0o755)
    return top


def _unpack_debian(apt: Path, top: Path) -> None:
    """Let apt resolve for an arm64 machine with nothing installed, in folders of its own; unpack without installing."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "1",
        "Dir::State": str(apt),
        "Dir::State::Lists": str(apt / "lists"),
        "Dir::State::status": str(apt / "status"),
        "Dir::Cache": str(apt / "cache"),
    }
    get = ["apt-get", "-q", "-y", *(f"-o{key}={value}" for key, value in settings.items())]
    todo = "Check the network, and that apt's sources have arm64 packages: Debian's do, Ubuntu's are on another server"
    _do([*get, "update"], "apt's lists for arm64", todo)
    _do([*get, "install", "--download-only", "--no-install-recommends", *DEBIAN], "Debian's arm64 packages", todo)
    top.mkdir()
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        _do(["dpkg", "-x", str(package), str(top)], package.name, "Make room, and try again")


def _unpack_wheels(folder: Path, site: Path, python: str, wheels: list[str]) -> None:
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in GLIBC_MINORS] + ["manylinux2014_aarch64"]
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    download += ["--implementation", "cp", "--python-version", python]
    todo = "Check the network and pip's settings, and try again"
    _do([*download, *(f"--platform={platform}" for platform in platforms), *wheels], "aarch64 wheels", todo)
    for name, keep in WHEELS.items():
        (wheel,) = folder.glob(f"{name.replace('-', '_')}-[0-9]*.whl")
        with zipfile.ZipFile(wheel) as archive:
            kept = [entry for entry in archive.namelist() if entry.startswith(keep)]
            assert kept, f"{wheel.name} holds nothing of {', '.join(keep)}"
            archive.extractall(site, kept)


def _do(command: list[str], what: str, todo: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith(("E:", "ERROR", "dpkg"))] or said[-1:]
        raise BoardError(
            f"--board qemu: {what} cannot be had: {'; '.join(errors) or f'left with {done.returncode}'}. {todo}."
        )
