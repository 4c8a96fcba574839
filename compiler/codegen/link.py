"""Object files to a shared library for the target, on any machine, with `zig cc` from the ziglang wheel.

Hermetic: zig brings its own linker, C library stubs for every glibc version, and compiler-rt. Reproducible: the same
objects give the same bytes in any folder (no build id, no symbol table, no paths).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from compiler.codegen import elf
from compiler.errors import UserError
from targets import Target

ROOM_BYTES = 8 << 20  # objects, the library and its copies while it is linked: 1 to 4 MiB were seen
LAST_LINES = 12  # of what zig says that a message shows: on a full disk it is a thousand
FLAGS = ("-shared", "-s", "-Wl,--build-id=none")
# What TVM's code may leave to the runtime libraries, which are loaded before it with RTLD_GLOBAL.
RUNTIME_PREFIXES = ("TVMFFI", "TVMBackend")
LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "ld-linux-aarch64.so.1", "ld-linux-x86-64.so.2"}


class LinkError(UserError):
    """The linker is missing or failed, or its result would not load on the target."""


def cache_dir() -> Path:
    """Where quern keeps what can be made again: $QUERN_CACHE, or `quern` in the user's cache folder."""
    if own := os.environ.get("QUERN_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quern"


def link(objects: list[Path], out: Path, target: Target, libraries: tuple[str, ...] = ()) -> None:
    """A shared library at `out`, checked. An older file there is replaced at once, never left half-written.

    libraries: of glibc, by the names that -l takes. Raises LinkError.
    """
    assert objects, "nothing to link"
    require_zig(out)
    # When this is interrupted, zig may write on for a moment: then the folder goes with the one it is in.
    beside, prefix = out.parent.resolve(), f".{out.name}."
    with tempfile.TemporaryDirectory(dir=beside, prefix=prefix, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / out.name
        command = [sys.executable, "-m", "ziglang", "cc", "-target", target.zig_triple, *FLAGS, "-o", str(made)]
        command += [*(str(path.resolve()) for path in objects), *(f"-l{name}" for name in libraries)]
        done = subprocess.run(command, env=zig_environment(), cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode or not made.is_file():
            said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-LAST_LINES:])
            raise LinkError(
                f"{out}: linking for {target.zig_triple} failed (zig cc left with {done.returncode}):\n{said}"
            )
        check(made, target, shown=out)
        made.replace(out)


def require_zig(out: Path) -> None:
    """Raise LinkError when there is nothing to make `out` with."""
    if importlib.util.find_spec("ziglang") is None:
        raise LinkError(
            f"{out}: cannot link, because the Python package 'ziglang' is not installed. "
            f"It is one of quern's dependencies: run 'make venv', or '{sys.executable} -m pip install ziglang'."
        )


def export(executable: Any, out: Path, target: Target) -> None:
    """Write what `tvm.compile` or `relax.build` made for `target` as one shared library. Raises LinkError."""
    # Beside `out`, as in `link`: what a signal leaves while the folder is being made goes with the one it is in.
    beside = out.parent.resolve()
    free = shutil.disk_usage(beside).free
    if free < ROOM_BYTES:  # LLVM ends the process when it cannot write
        raise LinkError(
            f"{out}: linking takes up to {ROOM_BYTES >> 20} MiB, but its disk has {free >> 20} MiB left. Make room"
            f"{', or set TMPDIR to another place' if beside.is_relative_to(tempfile.gettempdir()) else ''}."
        )
    with tempfile.TemporaryDirectory(dir=beside, prefix=".objects.", ignore_cleanup_errors=True) as scratch:
        executable.export_library(
            str(out), fcompile=lambda _, files: link([Path(f) for f in files], out, target), workspace_dir=scratch
        )


def check(library: Path, target: Target, shown: Path | None = None) -> None:
    """Raise LinkError unless `library` loads on every machine of `target` that has the TVM runtime loaded.

    Messages call the file `shown`.
    """
    where = shown or library
    try:
        found = elf.read(library)
    except elf.ElfError as error:
        raise LinkError(str(error)) from error
    if found.arch != target.arch:
        raise LinkError(f"{where}: is for {found.arch}, but target {target.name!r} is {target.arch}.")
    floor = _glibc_number(f"GLIBC_{target.glibc}")
    if newer := [v for v in found.versions if v.startswith("GLIBC_") and _glibc_number(v) > floor]:
        raise LinkError(f"{where}: needs {', '.join(newer)}, but {target.name!r} promises glibc {target.glibc} only.")
    if strange := set(found.needed) - LIBRARIES:
        raise LinkError(f"{where}: needs {', '.join(sorted(strange))}, which a device need not have.")
    if missing := [name for name in found.unversioned if not name.startswith(RUNTIME_PREFIXES)]:
        raise LinkError(
            f"{where}: nobody defines {', '.join(missing)}: neither glibc {target.glibc} nor the TVM runtime has it."
        )


def _glibc_number(version: str) -> tuple[int, ...]:
    """GLIBC_2.28 -> (2, 28); a name that is no number (GLIBC_PRIVATE) counts as newer than all."""
    parts = version.removeprefix("GLIBC_").split(".")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else (sys.maxsize,)


def zig_environment() -> dict[str, str]:
    """The caller's environment, with zig's caches in one place: by default it would leave one in the current folder."""
    cache = os.environ.get("ZIG_GLOBAL_CACHE_DIR") or str(cache_dir() / "zig")
    Path(cache).mkdir(parents=True, exist_ok=True)
    return os.environ | {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache, "NO_COLOR": "1"}
