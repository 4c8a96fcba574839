"""All kernels of a module as one translation unit, compiled for the target's GPU.

One unit, because NVRTC reads quern.cuh once then, and the driver loads one module. Each kernel stands in a namespace of
its own, so that helpers of equal names do not meet; `extern "C"` functions keep their plain names all the same, and are
named outside of it too, for the emulator to find them.
"""

from __future__ import annotations

from collections.abc import Iterable

from compiler.codegen.nvrtc import DeviceCode
from schedules.cuda.kernel import CudaKernel

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


def spills(code: DeviceCode) -> str:
    """What to say of kernels that keep registers in memory, "" if there are none.

    They are right and slow. Which shapes do that is ptxas's affair; tests sample them, and no user should lose a build.
    """
    found = {name: used.spill_bytes for name, used in code.functions.items() if used.spill_bytes}
    if not found:
        return ""
    named = ", ".join(f"{name} ({count} bytes a thread)" for name, count in found.items())
    return f"slower than need be, because registers spill into memory; please report it: {named}"
