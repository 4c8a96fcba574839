"""A CUDA kernel as a library that a board can time, in the form of a bundle's model.so: one function, no weights.

Its parameters are the operator's arguments; its results lie at the front of its arena, one behind the other, before the
kernel's temporaries. NVRTC and zig make it here; runtime/rpc_cuda.py loads it there.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import tvm

from compiler.codegen import nvrtc
from compiler.codegen.cuda import device_code, library, tables
from compiler.passes.lower_to_launches import ALIGNMENT, FunctionPlan, Launches, Place, Step
from schedules.cuda.kernel import CudaKernel, Launch
from schedules.kernel import Request, TensorSpec
from targets import Target

FUNCTION = "main"
SPIN, SPIN_THREADS = "spin", 64
# Steps of the canary that counts clock cycles: six dependent instructions of 4 to 6 cycles each, 0.5 to 1 ms at 1 GHz.
SPIN_STEPS = 1 << 15
SPIN_BYTES = 4 * SPIN_THREADS
COPY_BYTES, LEAST_COPY_BYTES = 64 << 20, 1 << 20  # of the canary that watches the memory: more than any L2 cache
SPIN_SOURCE = f"""#include "quern.cuh"
extern "C" __global__ void {SPIN}(unsigned* out) {{
  unsigned x = threadIdx.x + 1;
  for (int i = 0; i < {SPIN_STEPS}; i++) {{
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
  }}
  out[threadIdx.x] = x;
}}
"""


def build(kernel: CudaKernel, request: Request, path: Path) -> None:
    """The library of a kernel that was lowered from `request`."""
    outs = [_up(_nbytes(out)) for out in request.outs]
    scratch = [_up(_nbytes(spec)) for spec in kernel.temporaries]
    names = tuple(f"argument_{i}" for i in range(len(request.args)))
    _write(kernel, names, [*outs, *scratch], sum(outs), path, request.target)


def canaries(path: Path, target: Target) -> None:
    """The library with `spin`, whose only parameter is its output of SPIN_BYTES."""
    _write(canary(), ("out",), [], ALIGNMENT, path, target)


def canary() -> CudaKernel:
    """xorshift32, one step after the other: how long it takes is the GPU's clock."""
    return CudaKernel(SPIN, SPIN_SOURCE, (Launch(SPIN, (1, 1, 1), (SPIN_THREADS, 1, 1), (0,)),))


def copy_bytes(least_bytes: int) -> int:
    """What a board's canary copies where so many bytes of weights are rotated."""
    return max(LEAST_COPY_BYTES, min(COPY_BYTES, least_bytes // 4))


def _write(
    kernel: CudaKernel, parameters: tuple[str, ...], arena: list[int], result_bytes: int, path: Path, target: Target
) -> None:
    gpu = target.gpu
    assert gpu is not None, target.name
    starts = [sum(arena[:i]) for i in range(len(arena))]
    places = [*(Place(i, parameter=True) for i in range(len(parameters))), *map(Place, starts)]
    steps = tuple(Step(launch, tuple(places[i] for i in launch.arguments)) for launch in kernel.launches)
    plan = FunctionPlan(FUNCTION, "hidden", 0, 0, 0, result_bytes, steps)
    launches = Launches((plan,), parameters, {kernel.name: kernel}, {}, max(ALIGNMENT, sum(arena)))
    code = nvrtc.compile(device_code.unit([kernel]), gpu)
    library.build(tables.source(launches, code, gpu), path, target)


def _nbytes(spec: TensorSpec) -> int:
    return prod(spec.shape) * int(tvm.DataType(spec.dtype).itemsize)


def _up(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
