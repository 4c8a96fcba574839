"""CUDA C++ to PTX and machine code on any machine: NVRTC 11.8 from its wheel, checked by ptxas 12.9 from its own.

No GPU, driver or CUDA installation is needed, and no header of the toolkit: kernels include schedules/cuda/quern.cuh.
NVRTC 11.8 is the last one that knows sm_53 and whose machine code every driver since JetPack 5 loads (minor version
compatibility of CUDA 11). It writes PTX 7.8; the version line is set to what the target's oldest driver reads, and
ptxas 12.9 must accept that: it refuses instructions that are newer than the version line (11.8's does not always).
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

from compiler.codegen import elf
from compiler.errors import UserError
from targets.target import Gpu

NVRTC = ("nvidia-cuda-nvrtc-cu11", "11.8.89", "nvidia/cuda_nvrtc/lib/libnvrtc.so.11.2")  # wheel, version, file in it
PTXAS = ("nvidia-cuda-nvcc-cu12", "12.9.86", "nvidia/cuda_nvcc/bin/ptxas")
HEADER = Path(__file__).parents[2] / "schedules" / "cuda" / "quern.cuh"
# No contraction: a fused multiply-add is where a kernel says fmaf, so that the emulator gives the device's bits.
FLAGS = ("-default-device", "--std=c++17", "--fmad=false")


class NvrtcError(UserError):
    """What compiles device code is missing or is another version."""


class DeviceCodeError(Exception):
    """A kernel of ours that does not compile, or that ptxas refuses: a bug in schedules/cuda/."""


@dataclass(frozen=True)
class Resources:
    """What a function needs, by ptxas: registers of a thread, bytes spilled by a thread, static shared memory, and
    instructions, without the padding behind them (ptxas 12.9's alone).
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int = 0


@dataclass(frozen=True)
class DeviceCode:
    """ptx: text without a final NUL. cubin: machine code, or None where the driver is to compile the PTX."""

    ptx: bytes
    cubin: bytes | None
    functions: Mapping[str, Resources]


@cache
def compile(source: str, gpu: Gpu) -> DeviceCode:  # noqa: A001 (as in re.compile)
    """PTX of the version that `gpu` states, machine code where it wants that; the same bytes for the same source.

    Raises NvrtcError (a wheel is missing) and DeviceCodeError (the source is wrong).
    """
    raw, _ = _nvrtc(source, f"compute_{gpu.sm}", "PTX")
    ptx = set_version(raw.rstrip(b"\0"), gpu.ptx)
    functions = _assemble(ptx, gpu.arch)
    if not gpu.cubin:
        return DeviceCode(ptx, None, MappingProxyType(functions))
    cubin, own = machine_code(source, gpu)
    assert own.keys() == functions.keys(), "NVRTC's log names every function"
    return DeviceCode(ptx, cubin, MappingProxyType({name: _most(functions[name], own[name]) for name in functions}))


def machine_code(source: str, gpu: Gpu) -> tuple[bytes, dict[str, Resources]]:
    """What a driver loads as it is, and what it needs by NVRTC's own ptxas. Raises as `compile`."""
    cubin, log = _nvrtc(source, gpu.arch, "CUBIN")
    return cubin, _resources(log)


def _most(one: Resources, other: Resources) -> Resources:
    """Of two: ptxas 12.9 stands for drivers that compile the PTX, NVRTC's own made the code that is carried."""
    return Resources(*map(max, vars(one).values(), vars(other).values()))


def set_version(ptx: bytes, version: str) -> bytes:
    """The same PTX with another `.version` line."""
    changed, count = re.subn(rb"(?m)^\.version \d+\.\d+$", b".version " + version.encode(), ptx)
    assert count == 1, "PTX has one version line"
    return changed


def _wheel_file(wheel: tuple[str, str, str]) -> Path:
    name, version, file = wheel
    install = f"Install what building for CUDA needs: {sys.executable} -m pip install 'quern[cuda]'"
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise NvrtcError(f"CUDA targets need {name} {version} (a Python package). {install}.") from None
    if found.version != version:
        raise NvrtcError(f"CUDA targets need {name} {version}, but {found.version} is installed. {install}.")
    path = Path(str(found.locate_file(file)))
    if not path.is_file():
        raise NvrtcError(
            f"CUDA targets need {path}, which {name} {version} brings, but it is not there. "
            f"Install the package again: {sys.executable} -m pip install --force-reinstall {name}=={version}."
        )
    return path


def require() -> None:
    """Raise NvrtcError unless both compilers are installed, as they must be: before work that takes long."""
    for wheel in (NVRTC, PTXAS):
        _wheel_file(wheel)
    _ptxas()


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_wheel_file(NVRTC)))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _nvrtc(source: str, arch: str, kind: str) -> tuple[bytes, str]:
    """(PTX or CUBIN, log). In a thread of its own: NVRTC 11.8 leaves its caller's with the locale "C" (uselocale)."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_compiled, source, arch, kind).result()


def _compiled(source: str, arch: str, kind: str) -> tuple[bytes, str]:
    library, program = _library(), ctypes.c_void_p()

    def call(name: str, *args: object) -> int:
        return int(getattr(library, name)(*args))

    def text(kind: str) -> bytes:
        size = ctypes.c_size_t()
        assert call(f"nvrtcGet{kind}Size", program, ctypes.byref(size)) == 0
        buffer = ctypes.create_string_buffer(size.value)
        assert call(f"nvrtcGet{kind}", program, buffer) == 0
        return buffer.raw

    headers = (ctypes.c_char_p * 1)(HEADER.read_bytes())
    names = (ctypes.c_char_p * 1)(HEADER.name.encode())
    failed = call(
        "nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernel.cu", len(headers), headers, names
    )
    assert not failed, library.nvrtcGetErrorString(failed)
    try:
        flags = [f"--gpu-architecture={arch}", *FLAGS, *(["--ptxas-options=-v"] if kind == "CUBIN" else [])]
        options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        failed = call("nvrtcCompileProgram", program, len(flags), options)
        log = text("ProgramLog").rstrip(b"\0").decode(errors="replace")
        if failed:
            raise DeviceCodeError(f"{arch}: {library.nvrtcGetErrorString(failed).decode()}\n{log}")
        return text(kind), log
    finally:
        call("nvrtcDestroyProgram", ctypes.byref(program))


@cache
def _ptxas() -> Path:
    """The right ptxas: wheels of several CUDA versions put one at the same place."""
    path, (name, version, _) = _wheel_file(PTXAS), PTXAS
    said = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=False).stdout
    line = next((line for line in said.splitlines() if "release" in line), said.strip() or "nothing")
    if not line.endswith(f"V{version}"):
        raise NvrtcError(
            f"CUDA targets need ptxas {version} of {name}, but {path} says: {line}. Another package, perhaps "
            f"nvidia-cuda-nvcc-cu11, has a file of that name. Remove it, and install the right one again: "
            f"{sys.executable} -m pip install --force-reinstall {name}=={version}."
        )
    return path


FUNCTION = re.compile(r"Compiling entry function '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def _assemble(ptx: bytes, arch: str) -> dict[str, Resources]:
    """What ptxas says of every function. Its machine code is not used: CUDA 12's loads on fewer drivers."""
    with tempfile.TemporaryDirectory() as scratch:
        text, out = Path(scratch) / "kernel.ptx", Path(scratch) / "kernel.cubin"
        text.write_bytes(ptx)
        command = [str(_ptxas()), "-v", f"-arch={arch}", str(text), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DeviceCodeError(f"{arch}: ptxas refuses the kernel:\n{done.stdout}{done.stderr}")
        sizes = _instructions(out.read_bytes(), arch)
    return {
        name: replace(found, instructions=sizes[name])
        for name, found in _resources(done.stdout + done.stderr).items()
    }


def _instructions(cubin: bytes, arch: str) -> dict[str, int]:
    """How many each function has. Before sm_70 every fourth word of 8 bytes says when the three behind it may go; since
    then an instruction has 16 bytes. Behind a function are a jump to itself and equal words.
    """
    found = {}
    for name, code in elf.named_code(cubin).items():
        if int(arch.removeprefix("sm_")) < 70:
            words = [code[i : i + 8] for i in range(0, len(code), 8) if i % 32]
        else:
            words = [code[i : i + 12] for i in range(0, len(code), 16)]  # the last 4 bytes hold waits, too
        while len(words) > 1 and words[-1] == words[-2]:
            words.pop()
        found[name.removeprefix(".text.")] = max(1, len(words) - 2)
    return found


def _resources(report: str) -> dict[str, Resources]:
    """ptxas -v, a function at a time. spill_bytes: stores and loads together, or stack that holds arrays."""
    found: dict[str, Resources] = {}
    pieces = FUNCTION.split(report)
    for name, text in zip(pieces[1::2], pieces[2::2], strict=True):
        spill, used, shared = SPILL.search(text), USED.search(text), SHARED.search(text)
        assert spill and used, f"ptxas says nothing of {name}:\n{text}"
        stack, stores, loads = map(int, spill.groups())
        found[name] = Resources(int(used[1]), max(stack, stores + loads), int(shared[1]) if shared else 0)
    return found
