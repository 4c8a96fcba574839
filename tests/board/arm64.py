"""A board in a box: an arm64 root with Python, numpy, tokenizers and TVM's runtime, on an emulated Cortex-A72.

The root is made once, from Debian's packages and PyPI's aarch64 wheels as this machine's apt and pip are set up, and
kept under `cache_dir()`; neither root rights nor binfmt are needed. qemu-aarch64 refuses instructions that a Cortex-A72
lacks, so an `Illegal instruction` here is one there. Its speed says nothing about a real board.
"""
from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compiler.codegen.link import cache_dir

QEMU = "qemu-aarch64"
RECIPE = 1  # raise it when the steps below change what a root holds
TOOLS = (QEMU, "apt-get", "dpkg")
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


class BoardError(RuntimeError):
    """The root could not be made: what was run, and what it said."""


def missing_tools() -> list[str]:
    """Programs that the board needs and this machine lacks."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def run(
    args: Sequence[str | Path],
    *,
    pythonpath: Sequence[Path] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 300,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run the board's Python: run(["-c", "print(1)"]). `pythonpath` comes before the board's own packages.

    With `check`, a non-zero exit raises BoardError with what the program wrote.
    """
    top = root()
    python = (top / "usr/bin/python3").resolve()
    command = [QEMU, "-cpu", "cortex-a72", "-L", str(top), str(python), "-S", *map(str, args)]
    environment = {
        "HOME": str(top),
        "LANG": "C.UTF-8",
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONHOME": str(top / "usr"),
        "PYTHONPATH": os.pathsep.join(map(str, [*pythonpath, top / "site"])),
        **(env or {}),
    }
    done = _spawn(command, env=environment, cwd=cwd, timeout=timeout_s)
    if check and done.returncode:
        raise BoardError(_said(command, done))
    return done


@functools.cache
def root() -> Path:
    """The arm64 root, made now if there is none. Two processes that need it make it once: the second one waits."""
    wheels = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
    recipe = repr((RECIPE, DEBIAN, wheels, WHEELS, CPUINFO))
    top = cache_dir() / f"arm64-root-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    cache_dir().mkdir(parents=True, exist_ok=True)
    with _lock(cache_dir() / "arm64-root.lock"):
        if not top.is_dir():
            with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="arm64-making-") as scratch:
                _make(Path(scratch), wheels).rename(top)
    return top


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(scratch: Path, wheels: list[str]) -> Path:
    top = scratch / "root"
    _unpack_debian(scratch / "apt", top)
    version = (top / "usr/bin/python3").resolve().name.removeprefix("python")
    _unpack_wheels(scratch / "wheels", top / "site", version, wheels)
    (top / "proc").mkdir()
    (top / "proc/cpuinfo").write_text(CPUINFO)
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
    _do([*get, "update"])
    _do([*get, "install", "--download-only", "--no-install-recommends", *DEBIAN])
    top.mkdir()
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        _do(["dpkg", "-x", str(package), str(top)])


def _unpack_wheels(folder: Path, site: Path, python: str, wheels: list[str]) -> None:
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in GLIBC_MINORS] + ["manylinux2014_aarch64"]
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    download += ["--implementation", "cp", "--python-version", python]
    _do([*download, *(f"--platform={platform}" for platform in platforms), *wheels])
    for name, keep in WHEELS.items():
        (wheel,) = folder.glob(f"{name.replace('-', '_')}-[0-9]*.whl")
        with zipfile.ZipFile(wheel) as archive:
            kept = [entry for entry in archive.namelist() if entry.startswith(keep)]
            if not kept:
                raise BoardError(f"{wheel.name} holds nothing of {', '.join(keep)}")
            archive.extractall(site, kept)


def _do(command: list[str]) -> None:
    if (done := _spawn(command)).returncode:
        raise BoardError(_said(command, done))


def _spawn(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, **settings)


def _said(command: list[str], done: subprocess.CompletedProcess[str]) -> str:
    return f"{' '.join(command)}\nleft with {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
