"""Linear layers for the CUDA tests: the CPU tests' weights and references, kernels in the emulator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

import targets
from compiler.quant.grids import GRIDS
from compiler.quant.ir import QuantWeight
from schedules.cuda.kernel import CudaKernel, Lower, lowerings
from schedules.kernel import Request, TensorSpec
from tests.emulator import cuda
from tests.schedules.kernels import spec
from tests.schedules.test_linear_grids import weight_arguments

Activations = tuple[np.ndarray, np.ndarray, np.ndarray]
GPUS = {name: targets.load(name) for name in ("jetson-nano", "jetson-xavier", "jetson-orin", "cuda-sm90")}


def arguments(activations: Activations, w: QuantWeight, residual: np.ndarray | None) -> list[np.ndarray]:
    return [*activations, *weight_arguments(w), *([] if residual is None else [residual])]


def request(
    args: list[np.ndarray], w: QuantWeight, gpu: str, knobs: Mapping[str, int] | None = None, residual: bool = False
) -> Request:
    grid = GRIDS[w.grid]
    kind = "_table" if grid.values is not None else "_offset" if w.offset is not None else ""
    attrs: dict[str, int | str] = {"bits": grid.bits, "group": w.group_size}
    if grid.values is not None:
        attrs = {"grid": w.grid, **attrs}
    op = f"quern.linear_int8{kind}{'_residual' if residual else ''}"
    out = TensorSpec((args[0].shape[0], w.type.n), "float32")
    return Request(op, tuple(map(spec, args)), (out,), attrs, GPUS[gpu], knobs or {}, table=grid.values)


def lowered(
    activations: Activations, w: QuantWeight, gpu: str, knobs: Mapping[str, int] | None = None,
    residual: np.ndarray | None = None, lower: Lower | None = None,
) -> CudaKernel:  # fmt: skip
    """The kernel that the target's families choose, or that of one family."""
    call = request(arguments(activations, w, residual), w, gpu, knobs, residual is not None)
    return (lower or lowerings()[call.op])(call)


def run(kernel: CudaKernel, activations: Activations, w: QuantWeight, residual: np.ndarray | None = None) -> np.ndarray:
    """One linear layer on canonical weights, packed as its kernel asks."""
    args = arguments(activations, w, residual)
    packed = [kernel.packings[i].pack(a) if i in kernel.packings else a for i, a in enumerate(args)]
    for i, packing in kernel.packings.items():
        assert spec(packed[i]) == packing.spec
    out = np.full((args[0].shape[0], w.type.n), np.nan, np.float32)
    cuda.run(kernel, [*packed, out])
    return out


def edited(kernel: CudaKernel, old: str, new: str) -> CudaKernel:
    """The kernel with one place of its source changed."""
    assert kernel.source.count(old) == 1, f"{old!r} is there {kernel.source.count(old)} times"
    return replace(kernel, source=kernel.source.replace(old, new))
