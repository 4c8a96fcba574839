"""Kernels on a CPU that is not at hand: linked with a small driver, run under qemu, every instruction counted.

The driver (calls.c) is a static program without a C library; the counter (count.c) is a plugin of qemu-user. zig
compiles both. What is counted is exact and the same on every machine; how long it takes means nothing.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compiler.codegen import elf
from compiler.codegen.link import LinkError, cache_dir, zig_environment
from compiler.errors import UserError
from targets import Target

HERE = Path(__file__).parent
QEMU = {"aarch64": "qemu-aarch64", "riscv64": "qemu-riscv64"}
ALIGNMENT = 64
LIMIT_S = 3600  # of one run: the largest take minutes, and what takes longer hangs
DLPACK_CODES = {"i": 0, "u": 1, "f": 2}  # numpy's kind -> dlpack.h
# What qemu 7.2 calls the CPUs it has; another one is stood for by `max`, which knows every extension.
MODELS = ("cortex-a53", "cortex-a72", "cortex-a76")
RISCV_MODEL = "rv64,v=true,vlen=128,vext_spec=v1.0,Zfhmin=true"
FLAGS = ("-nostdlib", "-static", "-ffreestanding", "-fno-stack-protector", "-O2", "-Wl,--build-id=none")

Tensors = Mapping[str, "np.ndarray | tuple[tuple[int, ...], str]"]  # an array, or shape and dtype of zeros


@dataclass(frozen=True)
class Call:
    """One kernel and the names of its tensors, in the order of its parameters."""

    kernel: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Executed:
    """One instruction that ran: its address in the program, its bytes as a little-endian number, how often."""

    address: int
    word: int
    count: int


@dataclass(frozen=True)
class Program:
    """A linked driver with kernels in it, for one target. `kernels` in the order that plans count them by."""

    path: Path
    kernels: tuple[str, ...]
    target: Target

    def run(
        self, tensors: Tensors, calls: Sequence[Call], outputs: Sequence[str], cpu: str | None = None
    ) -> list[np.ndarray]:
        """Run the calls in order; the named tensors as they are afterwards."""
        return self._run(tensors, calls, outputs, cpu, [])

    def count(self, tensors: Tensors, calls: Sequence[Call]) -> list[Executed]:
        """Every instruction that ran, driver included, by address."""
        return self.watch(tensors, calls, [])[1]

    def watch(
        self, tensors: Tensors, calls: Sequence[Call], outputs: Sequence[str]
    ) -> tuple[list[np.ndarray], list[Executed]]:
        """`run` and `count` at once."""
        with tempfile.TemporaryDirectory(prefix="quern-count-") as folder:
            out = Path(folder) / "counts"
            found = self._run(tensors, calls, outputs, None, ["-plugin", f"{counter()},out={out}"])
            return found, read_counts(out)

    def _run(
        self, tensors: Tensors, calls: Sequence[Call], outputs: Sequence[str], cpu: str | None, plugin: list[str]
    ) -> list[np.ndarray]:
        with tempfile.TemporaryDirectory(prefix="quern-calls-") as folder:
            plan, data, out = (Path(folder) / name for name in ("plan", "data", "out"))
            _write(plan, data, tensors, calls, outputs, self.kernels)
            command = [qemu(self.target), "-cpu", cpu or model(self.target), *plugin, str(self.path)]
            command += [str(plan), str(data), str(data.stat().st_size), str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\nleft with {done.returncode}\n{done.stdout}{done.stderr}")
            raw, results, at = out.read_bytes(), [], 0
            for name in outputs:
                shape, dtype = _shape_of(tensors[name])
                size = int(np.prod(shape)) * np.dtype(dtype).itemsize
                results.append(np.frombuffer(raw[at : at + size], dtype).reshape(shape))
                at += size
            return results

    def symbols(self) -> list[tuple[int, str]]:
        """(address, name) of every function, ascending."""
        return elf.functions(self.path)


def qemu(target: Target) -> str:
    """qemu-user for the target. Raises UserError when there is none."""
    if target.arch not in QEMU:
        raise UserError(f"--cost model counts instructions under qemu-user, for {' and '.join(QEMU)}; "
                        f"target {target.name!r} is {target.arch}.")  # fmt: skip
    if shutil.which(QEMU[target.arch]) is None:
        raise UserError(f"--cost model needs {QEMU[target.arch]}, which is not installed: apt-get install qemu-user.")
    return QEMU[target.arch]


def model(target: Target) -> str:
    """What qemu is told to be: the target's core, or one that can do more."""
    if target.arch == "riscv64":
        return RISCV_MODEL
    return target.mcpu if target.mcpu in MODELS else "max"


def link(module: Any, kernels: Sequence[str], target: Target, out: Path) -> Program:
    """The kernels of TVM's LLVM module with the driver, as a program at `out`."""
    objects, table = out.with_suffix(".o"), out.with_suffix(".c")
    module.write_to_file(str(objects), "o")
    declared = "".join(f"extern int __tvm_ffi_{name}(void *, const void *, int, void *);\n" for name in kernels)
    entries = ", ".join(f"__tvm_ffi_{name}" for name in kernels)
    table.write_text(
        f"typedef int (*kernel)(void *, const void *, int, void *);\n{declared}"
        f"const kernel quern_kernels[] = {{{entries}}};\n"
    )
    triple = f"{target.arch}-linux-none"
    _zig("-target", triple, *FLAGS, "-o", str(out), str(HERE / "calls.c"), str(table), str(objects))
    return Program(out, tuple(kernels), target)


@functools.cache
def counter() -> Path:
    """The plugin, compiled once a machine."""
    source = HERE / "count.c"
    library = cache_dir() / f"count-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".count-") as scratch:
            made = Path(scratch) / library.name
            _zig("-shared", "-fPIC", "-O2", "-s", "-o", str(made), str(source))
            made.replace(library)
    return library


def read_counts(path: Path) -> list[Executed]:
    """What the plugin wrote, by address."""
    rows = (line.split() for line in path.read_text().splitlines())
    return sorted((Executed(int(a, 16), int(w, 16), int(n)) for a, w, n in rows), key=lambda executed: executed.address)


def _zig(*arguments: str) -> None:
    command = [sys.executable, "-m", "ziglang", "cc", *arguments]
    done = subprocess.run(command, env=zig_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise LinkError(f"zig cc failed:\n{' '.join(arguments)}\n{(done.stderr or done.stdout).strip()}")


def _shape_of(tensor: np.ndarray | tuple[tuple[int, ...], str]) -> tuple[tuple[int, ...], str]:
    return tensor if isinstance(tensor, tuple) else (tensor.shape, str(tensor.dtype))


def _write(
    plan: Path, data: Path, tensors: Tensors, calls: Sequence[Call], outputs: Sequence[str], kernels: Sequence[str]
) -> None:
    """The files that calls.c describes."""
    numbers = [len(tensors)]
    with data.open("wb") as file:
        for tensor in tensors.values():
            shape, name = _shape_of(tensor)
            dtype = np.dtype(name)
            place = -1
            if not isinstance(tensor, tuple):
                place = -(-file.tell() // ALIGNMENT) * ALIGNMENT
                file.seek(place)
                file.write(np.ascontiguousarray(tensor).tobytes())
            numbers += [DLPACK_CODES[dtype.kind], 8 * dtype.itemsize, place, len(shape), *shape]
    index = {name: i for i, name in enumerate(tensors)}
    numbers.append(len(calls))
    for call in calls:
        numbers += [kernels.index(call.kernel), len(call.args), *(index[name] for name in call.args)]
    numbers += [len(outputs), *(index[name] for name in outputs)]
    plan.write_bytes(np.array(numbers, "<i8").tobytes())
