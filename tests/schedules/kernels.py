"""Builds one kernel the way the compiler does, through Relax, and runs it on this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

import targets
from schedules.counted import counted
from schedules.kernel import Kernel, Lower, Request, TensorSpec

NATIVE = targets.load("native")
AVX2 = targets.load("x86-64")
ARM = targets.load("rpi4")
RUNNABLE = [NATIVE, AVX2] if NATIVE.arch == "x86_64" else [NATIVE]
EPS32 = 2.0**-24  # largest relative error of one fp32 operation


@dataclass(frozen=True)
class Built:
    """A compiled kernel: call it with arrays, read its assembly."""

    kernel: Kernel
    executable: Any
    inplace: tuple[int, ...]

    def __call__(self, *args: np.ndarray, real: int | None = None) -> list[np.ndarray]:
        """Fresh outputs; arguments named in `inplace` are overwritten in the caller's arrays. real: how many tokens."""
        tensors = [tvm.runtime.tensor(a) for a in args]
        if self.kernel.counted:
            tensors.append(tvm.runtime.tensor(np.array([0, real or len(args[0])], np.int32)))
        result = relax.VirtualMachine(self.executable, tvm.cpu())["main"](*tensors)
        results = [result] if not isinstance(result, tvm.ir.Array | tuple | list) else list(result)
        for i in self.inplace:
            args[i][...] = tensors[i].numpy()
        return [r.numpy() for r in results[len(self.inplace) :]]

    @property
    def assembly(self) -> str:
        """Assembly of the module."""
        return "\n".join(m.inspect_source("asm") for m in self.executable.mod.imports if m.kind == "llvm")


def spec(array: np.ndarray) -> TensorSpec:
    return TensorSpec(array.shape, str(array.dtype))


def request(
    op: str,
    args: Sequence[np.ndarray],
    outs: Sequence[TensorSpec],
    target: targets.Target,
    knobs: Mapping[str, int] | None = None,
    **attrs: float,
) -> Request:
    return Request(op, tuple(map(spec, args)), tuple(outs), attrs, target, knobs or {})


def build(lower: Lower, call: Request, inplace: tuple[int, ...] = ()) -> Built:
    """One Relax function `main` that calls the kernel, counted; `inplace` are the arguments it updates."""
    kernel = counted(lower(call), len(call.args))
    types = [relax.TensorType(a.shape, a.dtype) for a in call.args]
    if kernel.counted:
        types.append(relax.TensorType((2,), "int32"))
    outs = [relax.TensorType(o.shape, o.dtype) for o in call.outs]
    variables = [relax.Var(f"a{i}", t) for i, t in enumerate(types)]
    block = relax.BlockBuilder()
    with block.function("main", variables):
        func = block.add_func(kernel.func.without_attr("global_symbol"), kernel.name)
        if inplace:
            indices = [*inplace, *[-1] * len(outs)]
            value = relax.op.call_tir_inplace(func, tuple(variables), indices, [types[i] for i in inplace] + outs)
        else:
            value = relax.call_tir(func, tuple(variables), outs if len(outs) > 1 else outs[0])
        block.emit_func_output(block.emit(value))
    executable = relax.build(block.get(), target=tvm.target.Target(call.target.tvm_target()))
    return Built(kernel, executable, inplace)


def widest_register(assembly: str) -> str:
    """The widest kind of vector register that the kernel names: zmm, ymm, or v0 for NEON."""
    return next(name for name in ("zmm", "ymm", "v0") if re.search(rf"\b{name}", assembly))


def assert_no_heap(assembly: str) -> None:
    """TVM turns a local buffer into a call of its workspace allocator unless it is small and of scope global."""
    assert "AllocWorkspace" not in assembly
