"""CUDA kernels for tests: lowered for an architecture, checked by ptxas, run in the emulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import targets
from compiler.codegen import nvrtc
from compiler.codegen.nvrtc import DeviceCode
from schedules.cuda.kernel import CudaKernel, Lower
from schedules.kernel import TensorSpec
from targets import Target
from tests.emulator import cuda
from tests.schedules.kernels import request

NANO, XAVIER, ORIN, SM90 = (targets.load(name) for name in ("jetson-nano", "jetson-xavier", "jetson-orin", "cuda-sm90"))
ALL = [NANO, XAVIER, ORIN, SM90]


@dataclass(frozen=True)
class Emulated:
    """A kernel that takes the operator's arguments, canonical weights among them, and gives its fresh outputs."""

    kernel: CudaKernel
    target: Target
    outs: Sequence[TensorSpec]

    def __call__(self, *args: np.ndarray) -> list[np.ndarray]:
        packings = self.kernel.packings
        packed = [packings[i].pack(a) if i in packings else a for i, a in enumerate(args)]
        for i, packing in packings.items():
            assert (packed[i].shape, str(packed[i].dtype)) == (packing.spec.shape, packing.spec.dtype)
            assert packed[i].flags.c_contiguous
        outs = [np.full(out.shape, np.nan, out.dtype) for out in self.outs]
        gpu = self.target.gpu
        assert gpu is not None
        cuda.run(self.kernel, [*packed, *outs], gpu.sm)
        return outs

    @property
    def code(self) -> DeviceCode:
        """What NVRTC and ptxas make of it."""
        assert self.target.gpu is not None
        return nvrtc.compile(self.kernel.source, self.target.gpu)


def emulated(
    lower: Lower,
    op: str,
    args: Sequence[np.ndarray],
    outs: Sequence[TensorSpec],
    target: Target,
    knobs: Mapping[str, int] | None = None,
    **attrs: float,
) -> Emulated:
    """The kernel for arguments like these."""
    return Emulated(lower(request(op, args, outs, target, knobs, **attrs)), target, outs)


def check_resources(code: DeviceCode, registers: int, shared_bytes: int = 48 << 10) -> None:
    """Nothing is spilled, and blocks are as large as budgeted."""
    for name, used in code.functions.items():
        assert used.spill_bytes == 0, f"{name} spills {used.spill_bytes} bytes"
        assert used.registers <= registers, f"{name} takes {used.registers} registers, budget {registers}"
        assert used.shared_bytes <= shared_bytes, f"{name} takes {used.shared_bytes} bytes of shared memory"
