"""Prompt layers on codes that are unpacked once: every storage, grid and affine gives the template's bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compiler.quant.grids import GRIDS
from compiler.quant.reference import quantize_activations
from schedules import linear_int8, linear_int8_amx, linear_int8_unpacked
from schedules.geometry import Geometry
from schedules.isa import avx512_vnni
from schedules.kernel import Kernel, NotSuited, Request, TensorSpec
from targets import Target
from tests.schedules.kernels import AVX2, build, spec
from tests.schedules.linears import require, stand_in
from tests.schedules.test_linear_grids import weight, weight_arguments

ISA: Any = avx512_vnni
VNNI = stand_in(ISA)
LEAST = linear_int8_unpacked.TOKENS * (linear_int8_unpacked.FEW + 1)
CASES = [  # grid, offset, one zero, n, k, group, residual
    ("int4", False, False, 105, 172, 86, True),
    ("int4", False, True, 48, 256, 128, False),
    ("int3", True, False, 96, 384, 128, True),
    ("nf4", False, False, 33, 128, 64, False),
]


def call(m: int, bits: int, target: Target, group: int = 64) -> Request:
    """32 rows of two groups."""
    rows = [TensorSpec((m, 2, group), "int8"), TensorSpec((m, 2), "float32"), TensorSpec((m, 2), "int32")]
    matrix = [TensorSpec((32, 2 * group), "uint8"), TensorSpec((32, 2), "float16"), TensorSpec((32, 2), "int16")]
    out = TensorSpec((m, 32), "float32")
    return Request("quern.linear_int8", (*rows, *matrix), (out,), {"bits": bits, "group": group}, target)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_the_bits_of_the_template(case: tuple[str, bool, bool, int, int, int, bool]) -> None:
    require(VNNI)
    grid, offset, one_zero, n, k, group, residual = case
    rng = np.random.default_rng(1)
    w = weight(grid, offset, n, k, group)
    x = rng.standard_normal((LEAST, k)).astype(np.float32)
    args: list[np.ndarray] = [*quantize_activations(x, Geometry(k, group).source), *weight_arguments(w)]
    if one_zero:
        args[5] = np.full((1, 1), 8, np.int16)
    args += [rng.standard_normal((LEAST, n)).astype(np.float32)] if residual else []
    table = GRIDS[grid].values
    kind = "_table" if table is not None else "_offset" if offset else ""
    attrs: dict[str, int | str] = {"bits": GRIDS[grid].bits, "group": group} | ({"grid": grid} if table else {})
    op, out = f"quern.linear_int8{kind}{'_residual' if residual else ''}", TensorSpec((LEAST, n), "float32")
    request = Request(op, tuple(map(spec, args)), (out,), attrs, VNNI, table=table)

    def run(lower: Callable[[Request], Kernel]) -> np.ndarray:
        kernel = lower(request)
        packed = [kernel.packings[i].pack(a) if i in kernel.packings else a for i, a in enumerate(args)]
        (got,) = build(lambda _: kernel, replace(request, args=tuple(map(spec, packed))))(*packed)
        return got

    want = run(linear_int8.lower)
    assert np.abs(want).max() > 1
    assert np.array_equal(run(linear_int8_unpacked.lower), want)


def test_who_is_asked_next() -> None:
    assert "_unpacked_" in linear_int8_unpacked.lower(call(LEAST, 4, VNNI)).name
    others = [call(LEAST, 4, AVX2), call(LEAST, 8, VNNI), call(LEAST - 8, 4, VNNI), call(LEAST + 1, 4, VNNI)]
    for other in (*others, call(LEAST, 4, VNNI, group=32)):
        with pytest.raises(NotSuited):
            linear_int8_unpacked.lower(other)
    assert linear_int8_unpacked.RANK < linear_int8_amx.RANK
