"""A mock GPU for a process of its own: the environment in which a CUDA bundle finds it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from compiler.codegen import link

HERE = Path(__file__).parent
SOURCE = HERE / "libcuda.c"
SOURCES = [SOURCE, HERE / "device_code.c"]
HEADERS = Path(link.__file__).parent / "cuda"
FLAGS = ("-shared", "-O1", "-g0", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fno-sanitize=undefined")


@cache
def library(graphs: bool = True, triple: str = "native") -> Path:
    """The mock driver, compiled once for its text. graphs: False leaves the entry points of CUDA graphs out."""
    read = [*SOURCES, HERE / "device_code.h"]
    text = [*(path.read_text() for path in read), (HEADERS / "driver.h").read_text(), str(graphs), triple]
    digest = hashlib.sha256("\0".join(text).encode()).hexdigest()[:24]
    out = link.cache_dir() / "mock-libcuda" / digest / "libcuda.so.1"
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ziglang", "cc", "-target", triple, *FLAGS, f"-I{HEADERS}"]
        command += [*map(str, SOURCES), "-ldl"]
        command += [] if graphs else ["-DWITHOUT_GRAPHS"]
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:  # other processes may want it, too
            made = Path(scratch) / out.name
            subprocess.run([*command, "-o", str(made)], env=link.zig_environment(), check=True)
            made.replace(out)
    return out


def environment(
    kernels: Path | None = None, graphs: bool = True, triple: str = "native", **settings: object
) -> dict[str, str]:
    """Variables for a process that shall see the mock. settings: those of libcuda.c by their names in lower case."""
    found = {"QUERN_LIBCUDA": str(library(graphs, triple))}
    if kernels is not None:
        found["QUERN_MOCK_KERNELS"] = str(kernels)
    return found | {f"QUERN_MOCK_{name.upper()}": str(value) for name, value in settings.items()}
