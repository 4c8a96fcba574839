"""Runs one kernel on a CPU that this machine is not, under qemu-user: what tests/schedules/kernels.py does here."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compiler.measure import emulator
from compiler.measure.emulator import Call, Executed
from schedules.kernel import Kernel, Request
from tests.schedules.kernels import build, spec


def require(arch: str) -> None:
    """Skip (in CI: fail) without the emulator."""
    if shutil.which(emulator.QEMU[arch]) is None:
        pytest.skip(f"the emulated CPU needs {emulator.QEMU[arch]}: apt-get install qemu-user (on Debian or Ubuntu)")


def run(kernel: Kernel, request: Request, args: Sequence[np.ndarray], cpu: str | None = None) -> list[np.ndarray]:
    """The kernel's fresh outputs. args: canonical; they are packed as the kernel asks."""
    require(request.target.arch)
    with tempfile.TemporaryDirectory() as folder:
        program, tensors, call = _prepared(kernel, request, args, Path(folder))
        return program.run(tensors, [call], call.args[-len(request.outs) :] if request.outs else (), cpu)


def count(kernel: Kernel, request: Request, args: Sequence[np.ndarray]) -> list[Executed]:
    """What the kernel executed, without the driver."""
    require(request.target.arch)
    with tempfile.TemporaryDirectory() as folder:
        program, tensors, call = _prepared(kernel, request, args, Path(folder))
        symbols = program.symbols()
        starts = [address for address, _ in symbols]
        executed = program.count(tensors, [call])
        places = np.searchsorted(starts, [one.address for one in executed], "right") - 1
        return [one for one, at in zip(executed, places, strict=True) if at >= 0 and kernel.name in symbols[at][1]]


def _prepared(
    kernel: Kernel, request: Request, args: Sequence[np.ndarray], folder: Path
) -> tuple[emulator.Program, emulator.Tensors, Call]:
    packed = [kernel.packings[i].pack(a) if i in kernel.packings else a for i, a in enumerate(args)]
    for i, packing in kernel.packings.items():
        assert spec(packed[i]) == packing.spec
    built = build(lambda _: kernel, replace(request, args=tuple(map(spec, packed))))
    (llvm,) = (m for m in built.executable.mod.imports if m.kind == "llvm")
    program = emulator.link(llvm, [kernel.name], request.target, folder / "program")
    tensors: dict[str, np.ndarray | tuple[tuple[int, ...], str]] = {f"a{i}": a for i, a in enumerate(packed)}
    if built.kernel.counted:
        tensors["span"] = np.array([0, len(args[0])], np.int32)
    tensors |= {f"o{i}": (out.shape, out.dtype) for i, out in enumerate(request.outs)}
    return program, tensors, Call(kernel.name, tuple(tensors))
