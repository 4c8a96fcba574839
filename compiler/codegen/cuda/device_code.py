"""All kernels of a module as one translation unit, compiled for the target's GPU.

One unit, because NVRTC reads quern.cuh once then, and the driver loads one module. Each kernel stands in a namespace of
its own, so that helpers of equal names do not meet; `extern "C"` functions keep their plain names all the same, and are
named outside of it too, for the emulator to find them.
"""

from __future__ import annotations

from collections.abc import Iterable

from compiler.codegen import nvrtc
from compiler.codegen.nvrtc import DeviceCode
from schedules.cuda.kernel import CudaKernel
from targets import Gpu

INCLUDE = '#include "quern.cuh"'


def unit(kernels: Iterable[CudaKernel]) -> str:
    """The source text of all of them."""
    parts = [INCLUDE + "\n"]
    for i, kernel in enumerate(kernels):
        lines = kernel.source.splitlines()
        assert INCLUDE in lines, f"{kernel.name} does not include quern.cuh"
        body = "\n".join(line for line in lines if line != INCLUDE)
        names = dict.fromkeys(launch.function for launch in kernel.launches)
        named = "".join(f"using kernel_{i}::{name};\n" for name in names)
        parts.append(f"namespace kernel_{i} {{\n{body}\n}}\n{named}")
    return "\n".join(parts)


def compile_unit(source: str, gpu: Gpu) -> DeviceCode:
    """PTX and machine code. A kernel that spills registers into memory is a bug of ours, so that asserts."""
    code = nvrtc.compile(source, gpu)
    spilled = {name: used.spill_bytes for name, used in code.functions.items() if used.spill_bytes}
    assert not spilled, f"{gpu.arch}: kernels that spill (bytes a thread): {spilled}"
    return code
