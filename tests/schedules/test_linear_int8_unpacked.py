"""Prompt layers on codes that are unpacked once: every storage, grid and affine gives the template's bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compiler.quant.grids import GRIDS
from compiler.quant.reference import quantize_activations
from schedules import linear_int8, linear_int8_amx, linear_int8_unpacked
from schedules.geometry import Geometry
from schedules.isa import avx2, avx512_vnni, avx_vnni
from schedules.kernel import Lower, NotSuited, Request, TensorSpec
from targets import Target
from tests.schedules.kernels import ARM, Built, build, spec
from tests.schedules.linears import Shape, exact_weight, require, stand_in
from tests.schedules.test_linear_grids import weight, weight_arguments
from tests.schedules.test_linear_int8 import dots, extremes, integers

ISAS: dict[str, Any] = {isa.NAME: isa for isa in (avx2, avx_vnni, avx512_vnni)}
CASES = [  # instruction set, grid, offset, one zero, n, k, group, residual
    ("avx512_vnni", "int4", False, False, 105, 172, 86, True),
    ("avx512_vnni", "int4", False, True, 48, 256, 128, False),
    ("avx512_vnni", "int3", True, False, 96, 384, 128, True),
    ("avx512_vnni", "nf4", False, False, 33, 128, 64, False),
    ("avx2", "int3", True, False, 33, 384, 128, True),
    ("avx2", "int4", False, False, 105, 172, 86, True),
    ("avx2", "int4", False, True, 64, 96, 32, False),
    ("avx_vnni", "int4", False, False, 41, 172, 86, True),
    ("avx_vnni", "nf4", False, False, 24, 128, 64, False),
]


def tokens(isa: Any) -> tuple[int, int]:
    """The fewest for which codes are kept, and the most for which they are not."""
    few = isa.KNOBS["unpacked_few"] * isa.KNOBS["unpacked_tokens"]
    return few + isa.KNOBS["unpacked_tokens"], few


def call(m: int, bits: int, target: Target, group: int = 64) -> Request:
    """32 rows of two groups."""
    rows = [TensorSpec((m, 2, group), "int8"), TensorSpec((m, 2), "float32"), TensorSpec((m, 2), "int32")]
    matrix = [TensorSpec((32, 2 * group), "uint8"), TensorSpec((32, 2), "float16"), TensorSpec((32, 2), "int16")]
    out = TensorSpec((m, 32), "float32")
    return Request("quern.linear_int8", (*rows, *matrix), (out,), {"bits": bits, "group": group}, target)


def made(lower: Lower, request: Request, args: list[np.ndarray]) -> tuple[Built, list[np.ndarray]]:
    """The kernel, and what it takes."""
    kernel = lower(request)
    packed = [kernel.packings[i].pack(a) if i in kernel.packings else a for i, a in enumerate(args)]
    return build(lambda _: kernel, replace(request, args=tuple(map(spec, packed)))), packed


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_the_bits_of_the_template(case: tuple[str, str, bool, bool, int, int, int, bool]) -> None:
    name, grid, offset, one_zero, n, k, group, residual = case
    target, (most, few) = stand_in(ISAS[name]), tokens(ISAS[name])
    require(target)
    rng = np.random.default_rng(1)
    w = weight(grid, offset, n, k, group)
    x = rng.standard_normal((most, k)).astype(np.float32)
    args: list[np.ndarray] = [*quantize_activations(x, Geometry(k, group).source), *weight_arguments(w)]
    if one_zero:
        args[5] = np.full((1, 1), 8, np.int16)
    args += [rng.standard_normal((most, n)).astype(np.float32)] if residual else []
    table = GRIDS[grid].values
    kind = "_table" if table is not None else "_offset" if offset else ""
    attrs: dict[str, int | str] = {"bits": GRIDS[grid].bits, "group": group} | ({"grid": grid} if table else {})
    op, out = f"quern.linear_int8{kind}{'_residual' if residual else ''}", TensorSpec((most, n), "float32")
    request = Request(op, tuple(map(spec, args)), (out,), attrs, target, table=table)
    template, packed = made(linear_int8.lower, request, args)
    (want,) = template(*packed)
    assert np.abs(want).max() > 1
    kernel, packed = made(linear_int8_unpacked.lower, request, args)
    assert np.array_equal(kernel(*packed)[0], want)
    assert np.array_equal(kernel(*packed, real=few)[0][:few], want[:few])


@pytest.mark.parametrize("bits", [*avx2.SUMS, 8])
def test_integers_are_exact(bits: int) -> None:
    """Random codes, then extremes: as many products of one sign as a 16-bit sum holds. Scales: 0 or powers of two."""
    target, (most, few) = stand_in(ISAS["avx2"]), tokens(avx2)
    require(target)
    shape = Shape(bits, most, 41, 256, 128, "float32", residual=False)
    cases = [(exact_weight(shape), integers(shape)), *extremes(shape)]
    inputs = [(w, activations, [*activations, w.codes, w.scale, w.zero]) for w, activations in cases]
    attrs, out = {"bits": bits, "group": shape.group}, TensorSpec((most, shape.n), "float32")
    request = Request("quern.linear_int8", tuple(map(spec, inputs[0][2])), (out,), attrs, target)
    kernel, _ = made(linear_int8_unpacked.lower, request, inputs[0][2])
    packings = kernel.kernel.packings
    for w, activations, args in inputs:
        packed = [packings[i].pack(a) if i in packings else a for i, a in enumerate(args)]
        scales = w.scale[:, shape.geometry.weight_group].astype(np.float64)
        want = (dots(activations, w, shape.geometry) * scales).sum(-1)
        assert np.array_equal(kernel(*packed)[0], want)
        assert np.array_equal(kernel(*packed, real=few)[0][:few], want[:few])


def test_sums_hold_as_many_products_as_the_bound_allows() -> None:
    for bits, most in avx2.SUMS.items():
        assert avx2.held(bits) * 2 * ((1 << bits) - 1) * 127 <= 32767
        assert most < 2 * avx2.held(bits)


def test_who_is_asked_next() -> None:
    for isa in ISAS.values():
        least, target = tokens(isa)[0], stand_in(isa)
        assert f"{isa.NAME}_unpacked_" in linear_int8_unpacked.lower(call(least, 4, target)).name
        short = isa.KNOBS["unpacked_span"] // 2
        others = [call(least - 1, 4, target), call(least, 4, target, group=short), call(least, 4, ARM)]
        signed = replace(call(least, 4, target), op="quern.linear_int8_table", table=GRIDS["nf4"].values)
        others += [signed, call(least, 8, target, group=32)] if isa is avx2 else [call(least, 8, target)]
        for other in (*others, call(least - isa.KNOBS["unpacked_tokens"], 4, target)):
            with pytest.raises(NotSuited):
                linear_int8_unpacked.lower(other)
    assert linear_int8_unpacked.RANK < linear_int8_amx.RANK
