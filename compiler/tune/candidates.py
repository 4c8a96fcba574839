"""What the workers have in common, the local one and that of boards: kernels, their arguments, what counts as right.

A worker is a process, so that a candidate that hangs or crashes takes nothing else with it. It speaks pickled tuples
over a pipe: a command and its arguments, answered by ("ok", value), or by "failed" (the candidate's doing), "lost" or
"none" (the board's) and a message.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import tvm

from compiler.tune import inputs
from schedules.cuda import kernel as cuda
from schedules.cuda.kernel import CudaKernel
from schedules.kernel import Kernel, Request, lowerings
from targets import Target

ALIGNMENT = 64  # as in a weights file
MOST_COPIES = 4096  # of small weights: beyond it the calls cost more than the memory
READ_BYTES = 32 << 20  # of the arena, each time that the reader is timed
# Rows differ in the order of their fp32 sums only: some thousand roundings of 2^-24 each, far below this share of the
# largest result, and a kernel that forgets a block is far above it.
TOLERANCE = 1e-4
# Kernels of half precision round their sums to fp16 now and then, and each in an order of its own: 2^-11 a rounding, a
# few of which meet in one result. A kernel that forgets one block of 64 is off by a tenth and more. A prompt's
# attention on a GPU rounds weights to fp16, against the largest score so far, which depends on the blocks.
HALF_TOLERANCE = 4 * 2.0**-11
# A norm whose squares add up in another order has another factor by some 2^-24, and moves an activation over the edge
# of a rounding: one step of 127.
STEP_TOLERANCE = 1 / 127
PR_SET_PDEATHSIG = 1


class Lost(Exception):
    """The board is gone, or what comes from it makes no sense: it says nothing about the candidate."""


class NoBoard(Exception):
    """The tracker had no board to give in the time."""


@dataclass(frozen=True)
class Call:
    """An operator's default kernel and its arguments as the kernel wants them to lie, by name, in order.

    A counted kernel's tokens are all real.
    """

    kernel: Kernel | CudaKernel
    arrays: Mapping[str, np.ndarray]
    streamed: tuple[str, ...]
    bytes_per_call: float

    @classmethod
    def of(cls, request: Request, default: Mapping[str, int]) -> Call:
        """Random arguments, packed for the default kernel."""
        kernel, arrays = lower(request, default), inputs.canonical(request)
        names = list(arrays)
        for i, packing in kernel.packings.items():
            arrays[names[i]] = packing.pack(arrays[names[i]])
        if isinstance(kernel, Kernel) and kernel.counted:
            arrays["span"] = np.array([0, request.args[0].shape[0]], np.int32)
        streamed = tuple(name for name in names if name in inputs.STREAMED)
        read = sum(arrays[name].nbytes for name in streamed) * inputs.read_share(request)
        return cls(kernel, arrays, streamed, read)


def padded(nbytes: int) -> int:
    """Rounded up to the next ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def lower(request: Request, knobs: Mapping[str, int]) -> Kernel | CudaKernel:
    """The kernel of a request with these knobs, for the CPU or the GPU of its target."""
    chosen = replace(request, knobs=dict(knobs))
    return (lowerings() if request.target.gpu is None else cuda.lowerings())[request.op](chosen)


def candidate(request: Request, knobs: Mapping[str, int], default: Kernel | CudaKernel) -> Kernel | CudaKernel:
    """The same, if it takes its weights as the default does."""
    kernel = lower(request, knobs)
    if {i: p.name for i, p in kernel.packings.items()} != {i: p.name for i, p in default.packings.items()}:
        raise ValueError("these knobs change the layout of the weights")
    return kernel


def generate(funcs: Mapping[str, Any], target: Target) -> Any:
    """Code for functions of tensors, by name."""
    module = tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in funcs.items()})
    return tvm.compile(module, target=tvm.target.Target(target.tvm_target()))


def tolerance(request: Request) -> float:
    """How far results of an operator's kernels may lie apart, as a share of the largest."""
    on_tensor_cores = (
        request.target.gpu is not None
        and request.op.startswith("quern.attention")
        and request.args[0].shape[0] > 1
        and request.args[1].dtype != "float32"
    )
    if "norm_quantize" in request.op:
        return STEP_TOLERANCE
    return HALF_TOLERANCE if on_tensor_cores or "half" in request.op else TOLERANCE


def check(outs: Sequence[np.ndarray], reference: Sequence[np.ndarray], allowed: float = TOLERANCE) -> None:
    """Raise ValueError unless the results are the default's."""
    for out, want in zip(outs, reference, strict=True):
        error = np.abs(out.astype(np.float64) - want).max()
        if not error <= allowed * np.abs(want).max():
            raise ValueError(f"wrong results: off by {error:.3g} from the default's, whose largest is {want.max():.3g}")


def serve(worker: Any, descriptor: int) -> None:
    """Let `worker` answer commands until the other end is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # tuning was killed: do not go on alone
    connection = Connection(descriptor)
    while True:
        try:
            command, *arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = ("ok", getattr(worker, command)(*arguments))
        except NoBoard as error:
            answer = ("none", str(error))
        except Lost as error:
            answer = ("lost", str(error))
        except Exception as error:  # whatever TVM makes of a candidate is a result
            answer = ("failed", f"{type(error).__name__}: {error}"[-500:])
        connection.send(answer)
