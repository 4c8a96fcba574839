"""Runs CUDA kernels on this machine: `quern.cuh` without a GPU, with a watch on every access to memory.

What it is not: a stopwatch, or a test of what NVRTC and ptxas make of the source. Blocks run one after another, and
threads of a block take turns at barriers, so races between blocks stay unseen (a launch of ours has none to share).
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

import targets
from compiler.codegen import link
from compiler.codegen.nvrtc import HEADER
from schedules.cuda.kernel import CudaKernel
from tests.emulator.cuda import hardware

HERE = Path(__file__).parent
ALIGNED = 256  # what cuMemAlloc promises
FUNCTION = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(")
ALIGNED_SHARED = re.compile(r"__shared__\s+(alignas\([^)]*\))")  # clang wants them the other way round
POISON = 0xA5
COMMON = ("-std=c++17", "-fPIC", "-g0", "-fno-sanitize=undefined", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off")
WATCHED = ("-O1", "-fno-vectorize", "-fno-slp-vectorize", "-Xclang", "-fsanitize=thread")
ENTRIES = """
template <class... Parameters, size_t... I>
__attribute__((no_sanitize("thread")))
static void quern_call(void (*f)(Parameters...), void** a, std::index_sequence<I...>) {
  static_assert((std::is_pointer_v<Parameters> && ...), "kernels take pointers only");
  f(*static_cast<Parameters*>(a[I])...);
}
template <class... Parameters>
static void quern_call(void (*f)(Parameters...), void** a) {
  quern_call(f, a, std::index_sequence_for<Parameters...>());
}
struct QuernFunction { const char* name; void (*call)(void**); };
extern "C" const QuernFunction quern_functions[] = {%s {nullptr, nullptr}};
"""


class EmulationError(Exception):
    """A kernel did what a device would not forgive: the message says which thread, and what."""


class _Region(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("bytes", ctypes.c_uint64))


def library(source: str, sm: int = 90) -> Path:
    """The kernel source as a shared library for this machine, built once for its text. sm: which wrappers there are.

    C entries: int quern_launch(name, const unsigned grid[3], const unsigned block[3], shared, void** arguments), as
    cuLaunchKernel, 0 or 1; const char* quern_message(); quern_regions({start, bytes}*, count), see engine.cpp.
    """
    parts = [source, str(sm), *(path.read_text() for path in (HEADER, HERE / "emulator.h", HERE / "engine.cpp"))]
    parts.append(Path(__file__).read_text())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    out = link.cache_dir() / "cuda-emulator" / f"{digest}.so"
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            made = _build(Path(scratch), source, sm)
            made.replace(out)
    return out


def _build(scratch: Path, source: str, sm: int) -> Path:
    names = FUNCTION.findall(source)
    assert names, "the source has no __global__ function"
    entries = "".join(f'{{"{name}", [](void** a) {{ quern_call({name}, a); }}}}, ' for name in names)
    text, made = scratch / "kernel.cpp", scratch / "kernel.so"
    text.write_text(ALIGNED_SHARED.sub(r"\1 __shared__", source) + ENTRIES % entries)
    flags = [*COMMON, f"-DQUERN_EMULATED_SM={sm}", f"-I{HEADER.parent}", f"-I{HERE}", *WATCHED]
    _zig("c++", *flags, "-c", str(text), "-o", str(scratch / "kernel.o"))
    _zig("cc", "-shared", "-o", str(made), str(scratch / "kernel.o"), str(_engine()))  # "c++" would build a libc++
    return made


@cache
def _engine() -> Path:
    source = HERE / "engine.cpp"
    out = link.cache_dir() / "cuda-emulator" / f"{hashlib.sha256(source.read_bytes()).hexdigest()[:24]}.o"
    if not out.is_file():
        made = out.with_suffix(f".{id(out):x}.o")
        _zig("c++", *COMMON, "-O2", "-c", str(source), "-o", str(made))
        made.replace(out)
    return out


def _zig(*arguments: str) -> None:
    native = targets.load("native")
    command = [sys.executable, "-m", "ziglang", arguments[0], "-target", native.zig_triple, *arguments[1:]]
    if native.arch == "x86_64" and "-c" in arguments:  # not when linking: zig would build a runtime of its own for it
        command.append("-mcpu=x86_64_v3")
    done = subprocess.run(command, env=link.zig_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"the kernel's source does not compile:\n{done.stderr}")


@cache
def _loaded(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.quern_message.restype = ctypes.c_char_p
    return loaded


def run(kernel: CudaKernel, arrays: Sequence[np.ndarray], sm: int = 90) -> None:
    """All launches of the kernel. arrays: the operator's arguments in order (packed), then its fresh outputs.

    Every array that a launch may write is written in place. Raises EmulationError. On a GPU, where one is asked for.
    """
    if hardware.asked():
        hardware.run(kernel, arrays, sm)
        return
    places = [_Place(array.shape, array.dtype, array) for array in arrays]
    places += [_Place(spec.shape, np.dtype(spec.dtype), None) for spec in kernel.temporaries]
    loaded = _loaded(library(kernel.source, sm))
    regions = (_Region * len(places))(*(_Region(place.address, place.array.nbytes) for place in places))
    loaded.quern_regions(regions, len(regions))
    for launch in kernel.launches:
        values = [ctypes.c_void_p(places[i].address) for i in launch.arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        grid, block = (ctypes.c_uint * 3)(*launch.grid), (ctypes.c_uint * 3)(*launch.block)
        if loaded.quern_launch(launch.function.encode(), grid, block, launch.shared_bytes, pointers):
            raise EmulationError(f"{launch.function}: {loaded.quern_message().decode()}")
    for place, array in zip(places, arrays, strict=False):
        if array.flags.writeable:
            array[...] = place.array


class _Place:
    """An array where a device would have it: at a multiple of 256 bytes, but not of 512. Temporaries hold garbage."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, value: np.ndarray | None):
        size = int(np.prod(shape)) * dtype.itemsize
        self._memory = np.full(size + 3 * ALIGNED, POISON, np.uint8)
        start = -self._memory.ctypes.data % (2 * ALIGNED) + ALIGNED
        self.array = self._memory[start : start + size].view(dtype).reshape(shape)
        self.address = self._memory.ctypes.data + start
        if value is not None:
            self.array[...] = value
