"""Integer kernels as NVRTC and ptxas see them: every architecture, registers, no spills, what the PTX loads."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from compiler.codegen import nvrtc
from schedules.cuda import quantize
from schedules.geometry import Geometry
from tests.schedules.cuda.linears import GPUS, lowered
from tests.schedules.kernels import request
from tests.schedules.test_linear_grids import spans, weight
from tests.schedules.test_quantize import outputs

# Registers of a thread that a multiprocessor's 65536 leave for this many warps: 128: 16, 168: 12, 255: 8.
SOME, MANY, ALL = 128, 168, 255
BUDGETS = [  # device, grid, offset, tokens, group, registers
    ("jetson-nano", "int4", False, 1, 128, SOME), ("jetson-xavier", "int4", False, 1, 128, SOME),
    ("jetson-orin", "int4", False, 1, 128, SOME), ("cuda-sm90", "int4", False, 1, 128, SOME),
    ("jetson-orin", "int4", True, 1, 32, SOME), ("jetson-xavier", "nf4", False, 1, 64, SOME),
    ("jetson-orin", "int8", False, 1, 128, SOME), ("jetson-nano", "int8", False, 4, 128, SOME),
    ("jetson-orin", "int4", False, 4, 128, SOME),
    ("jetson-orin", "int4", False, 128, 128, MANY), ("jetson-orin", "int4", True, 128, 32, ALL),
    ("jetson-orin", "nf4", False, 16, 64, MANY), ("cuda-sm90", "int4", False, 512, 128, ALL),
    ("cuda-sm90", "int8", False, 128, 128, ALL), ("jetson-xavier", "int4", False, 128, 128, ALL),
    ("jetson-nano", "int4", False, 9, 8, MANY), ("jetson-orin", "int8", True, 128, 128, ALL),
    ("jetson-xavier", "int4", False, 32, 64, ALL), ("cuda-sm90", "int4", True, 1, 8, MANY),
    ("jetson-xavier", "nf4", False, 128, 32, ALL), ("jetson-xavier", "int8", False, 16, 128, ALL),
]  # fmt: skip


@pytest.mark.parametrize(("gpu", "grid", "offset", "m", "group", "registers"), BUDGETS)
def test_linear_layers_fit_their_budget(gpu: str, grid: str, offset: bool, m: int, group: int, registers: int) -> None:
    n = k = 2048
    w = weight(grid, offset, n, k, group)
    w = replace(w, scale=w.scale.astype(np.float16))
    kernel = lowered(spans(w, np.zeros((m, k))), w, gpu)
    device = GPUS[gpu].gpu
    assert device is not None
    code = nvrtc.compile(kernel.source, device)
    (used,) = code.functions.values()
    assert used.spill_bytes == 0
    assert used.registers <= registers
    assert used.shared_bytes + kernel.launches[0].shared_bytes <= 48 << 10
    ptx = code.ptx.decode()
    assert ".local" not in ptx
    assert set(re.findall(r"\.version (\S+)|\.target (\S+)", ptx)) == {(device.ptx, ""), ("", device.arch)}
    if m == 1:  # all codes come 16 bytes at a time, and nothing else of the size of a code
        kind = "ld.global.nc.v4.u32" if device.sm < 70 else "ld.global.nc.L1::no_allocate.v4.u32"
        assert ptx.count(kind) >= (4 if group >= 32 else 1)
        assert not re.search(r"ld\.global\S*\.u8", ptx)
    if device.sm >= 61 and m <= 4:
        assert "dp4a.s32.s32" in ptx
        assert ("cvt.rn.f32.s32" in ptx) == offset  # sums become fp32 without a conversion
    if device.sm >= 80 and m > 4:
        left = "u8" if grid == "int4" and not offset else "s8"  # code - zero + 128
        assert f"mma.sync.aligned.m16n8k32.row.col.s32.{left}.s8.s32" in ptx and "cp.async.cg.shared.global" in ptx
    if device.sm == 72 and m > 4:
        assert "wmma.mma.sync.aligned.row.col.m16n16k16.s32.s8.s8.s32" in ptx


@pytest.mark.slow
def test_no_shape_spills() -> None:
    """Spills cost speed, so a sample of everything is compiled: devices, grids, groups, tokens, dtypes of scales."""
    grids = [("int4", False), ("int4", True), ("int8", False), ("int8", True), ("nf4", False)]
    groups, tokens, scales = (8, 24, 32, 43, 64, 96, 128, 704), (1, 2, 4, 5, 32, 64, 200), ("float16", "float32")
    everything = list(product(GPUS, grids, groups, tokens, scales))
    for i in np.random.default_rng(0).choice(len(everything), 24, replace=False):
        gpu, (grid, offset), group, m, scale = everything[i]
        w = weight(grid, offset, 352, 1408, group)
        kernel = lowered(spans(w, np.zeros((m, 1408))), replace(w, scale=w.scale.astype(scale)), gpu)
        device = GPUS[gpu].gpu
        assert device is not None
        (used,) = nvrtc.compile(kernel.source, device).functions.values()
        assert used.spill_bytes == 0, kernel.name


@pytest.mark.parametrize(("gpu", "kind"), list(zip(GPUS, quantize.KINDS, strict=True)))
def test_quantisation_fits_its_budget(gpu: str, kind: str) -> None:
    k, more = 2048, [np.zeros(2048, np.float32)] if kind == "rms_norm_quantize" else []
    x = np.zeros((1, 2 * k if "glu" in kind else k), np.float32)
    call = request(f"quern.{kind}", [x, *more], outputs(1, Geometry(k, 128)), GPUS[gpu], group=128, eps=1e-5)
    call = replace(call, knobs={"warps": max(quantize.TRIED)})  # the largest blocks
    kernel, device = quantize.lower(call), GPUS[gpu].gpu
    assert device is not None
    (used,) = nvrtc.compile(kernel.source, device).functions.values()
    assert used.spill_bytes == 0 and used.registers <= 40
