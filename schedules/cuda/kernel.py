"""What a CUDA schedule file offers: operator name -> launches of CUDA functions. Files are found by walking the folder.

As in `schedules/kernel.py`, every file has `LOWERS: dict[str, Lower]`, and may have a `RANK` and `SPACES`; a `Lower`
gets the same `Request` and gives a `CudaKernel`, or raises `Unsupported` or `NotSuited`. What may be chosen for a
request, `schedules.kernel.space` says for these files, too.

Shapes are static, so a launch is data: the host walks a table, and nothing of a token is decided on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from schedules.kernel import Packing, Request, Space, TensorSpec, families, first_suited

Dim3 = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """One launch of the function `function` of a kernel's source.

    arguments: the device pointers it takes, in its order, as places: the operator's arguments in order, then its fresh
    outputs, then the kernel's temporaries. shared_bytes: dynamic shared memory.
    """

    function: str
    grid: Dim3
    block: Dim3
    arguments: tuple[int, ...]
    shared_bytes: int = 0


@dataclass(frozen=True)
class CudaKernel:
    """An operator as CUDA.

    `name` is a C identifier that states family, architecture where the text depends on it, shape, and last its choices
    by a letter and a number each; equal names mean equal kernels. `source` is CUDA C++ that includes nothing but
    "quern.cuh"; its functions are `extern "C" __global__`, take pointers only, and are called `name`, or `name` and a
    suffix. All sizes are constants in it. Launches run one after the other.
    temporaries: scratch arrays that nobody reads after the last launch. `packings` is as in `schedules.kernel.Kernel`.
    """

    name: str
    source: str
    launches: tuple[Launch, ...]
    packings: Mapping[int, Packing] = field(default_factory=dict)
    temporaries: tuple[TensorSpec, ...] = ()


def ordered(rows: int, tokens: int, order: int) -> Dim3:
    """The grid of so many tiles: 0, all rows of some tokens first, or 1, all tokens of some rows (`ORDER` in a text).

    What comes first is read again for every one of what comes last, from the second-level cache if that holds it:
    activations with 0, a tile's weights with 1, where memory then gives each weight once.
    """
    return (tokens, rows, 1) if order else (rows, tokens, 1)


Lower = Callable[[Request], CudaKernel]


def lowerings() -> dict[str, Lower]:
    """All operators that have a CUDA kernel, collected from every module of this package."""
    import schedules.cuda

    return {op: first_suited([module.LOWERS[op] for module in found]) for op, found in families(schedules.cuda).items()}


def block_size(request: Request, knob: str, default: int, tried: tuple[int, ...], **workload: int | str) -> Space:
    """The space of a kernel that has nothing to choose but the threads or warps of a block."""
    gpu = request.target.gpu
    assert gpu is not None, request.target.name
    schedule = f"cuda.{request.op.removeprefix('quern.')}.{gpu.arch}"
    return Space.around({knob: default}, {knob: tried}, schedule=schedule, workload=workload)
