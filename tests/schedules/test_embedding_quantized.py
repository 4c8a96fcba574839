"""Embedding tables in codes: rows equal the reference's, whatever shares a byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from compiler.quant.grids import GRIDS
from compiler.quant.ir import QuantWeight
from compiler.quant.reference import dequantize
from schedules import embedding_quantized
from schedules.kernel import Request, TensorSpec
from targets import Target
from tests.schedules.kernels import EPS32, RUNNABLE, build, spec
from tests.schedules.test_linear_grids import weight, weight_arguments

VOCAB = 11


def run(ids: np.ndarray, w: QuantWeight, target: Target, times: float = 1.0) -> np.ndarray:
    args = [ids, *weight_arguments(w)]
    grid = GRIDS[w.grid]
    kind = "_table" if grid.values is not None else "_offset" if w.offset is not None else ""
    attrs: dict[str, int | float | str] = {"bits": grid.bits, "group": w.group_size, "times": times, "grid": w.grid}
    if grid.values is None:
        attrs.pop("grid")
    out = TensorSpec((len(ids), w.type.k), "float32")
    op = f"quern.embedding_quantized{kind}"
    request = Request(op, tuple(map(spec, args)), (out,), attrs, target, table=grid.values)
    kernel = embedding_quantized.lower(request)
    packed = [kernel.packings[i].pack(a) if i in kernel.packings else a for i, a in enumerate(args)]
    for i, packing in kernel.packings.items():
        assert spec(packed[i]) == packing.spec
    assert packed[1].nbytes * 8 == w.codes.size * grid.bits or w.type.k % 8
    (got,) = build(lambda _: kernel, replace(request, args=tuple(map(spec, packed))))(*packed)
    return got


def test_one_row_by_hand() -> None:  # 2-bit codes 0..3, zero 1, scale 2, twice over: (code - 1) * 2 * 3
    codes = np.array([[0, 1, 2, 3, 3, 2, 1, 0]], np.uint8)
    w = QuantWeight(codes, np.array([[2.0]], np.float16), np.array([[1]], np.int16), "int2", 8)
    assert run(np.array([0], np.int32), w, RUNNABLE[0], 3.0).tolist() == [[-6, 0, 6, 12, 12, 6, 0, -6]]


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("m", "d", "group"), [(3, 344, 172), (2, 34, 16)])
@pytest.mark.parametrize("grid", list(GRIDS))
def test_rows_are_exact(grid: str, m: int, d: int, group: int, offset: bool, target: Target) -> None:
    if offset and GRIDS[grid].values is not None:
        return
    w = weight(grid, offset, VOCAB, d, group)
    ids = np.random.default_rng(1).integers(0, VOCAB, m).astype(np.int32)
    got, want = run(ids, w, target), dequantize(w)[ids]
    if not offset:
        assert np.array_equal(got, want)
    else:  # the product may reach its sum unrounded (fused multiply-add): off by that one rounding
        parts = np.abs(w.scale[:, np.arange(d) // group] * w.codes)[ids]
        assert (np.abs(got - want) <= 2 * EPS32 * np.maximum(parts, np.abs(want))).all()
