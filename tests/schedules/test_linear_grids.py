"""Linear layers on every grid, with offsets, and in every storage: integers exactly, floats within a counted bound."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import targets
from compiler.quant.grids import GRIDS
from compiler.quant.ir import QuantWeight
from compiler.quant.reference import dequantize, integer_form, matmul_exact, quantize_activations
from schedules import isa as isas
from schedules import linear_float, linear_int8, packed, storage
from schedules.geometry import Geometry
from schedules.kernel import Request, TensorSpec
from schedules.storage import Storage
from targets import features
from tests.emulator import x86
from tests.schedules.kernels import EPS32, NATIVE, build, spec

ISAS: list[Any] = [importlib.import_module(f"schedules.isa.{m.name}") for m in pkgutil.iter_modules(isas.__path__)]
QMAX = 127
CASES = [  # grid, offset, m, n, k, group: widths that fill the steps of each storage, and some that do not
    ("int2", False, 1, 40, 128, 64), ("int2", True, 3, 33, 96, 16), ("int2", False, 2, 16, 72, 24),
    ("int3", False, 1, 40, 256, 128), ("int3", False, 3, 33, 128, 16), ("int3", True, 1, 32, 172, 64),
    ("int4", False, 1, 40, 128, 32), ("int4", True, 1, 33, 256, 32), ("int4", True, 4, 64, 172, 43),
    ("int5", True, 1, 40, 256, 32), ("int5", False, 3, 17, 172, 48), ("int5", False, 1, 17, 40, 40),
    ("int6", False, 1, 40, 256, 16), ("int6", False, 4, 33, 172, 172), ("int6", True, 2, 33, 72, 24),
    ("int8", False, 1, 40, 128, 32), ("int8", True, 3, 33, 172, 43),
    ("nf4", False, 1, 40, 128, 64), ("nf4", False, 4, 33, 172, 43), ("fp4", False, 1, 33, 128, 64),
    ("iq4_nl", False, 3, 16, 64, 32),
]  # fmt: skip

by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
by_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.NAME)


def on(isa: Any) -> targets.Target:
    """A target with the features of the instruction set and no more; skips where its code cannot run."""
    flags = tuple(f"+{name}" for name in isa.NEEDS)
    if flags and not set(isa.NEEDS) <= set(features.CPUINFO_NAMES["x86_64"]):
        if NATIVE.arch != "aarch64":
            pytest.skip("this CPU lacks aarch64")
        return replace(targets.load("aarch64"), features=flags)
    if NATIVE.arch != "x86_64":
        if flags:
            pytest.skip("this CPU lacks x86_64")
        return replace(targets.load("aarch64"), features=())
    level = "x86-64-v4" if "avx512f" in isa.NEEDS else "x86-64-v3"
    needs = dict(zip(isa.NEEDS, features.cpuinfo_names("x86_64", flags, isa.NAME), strict=True))
    missing = [name for name in isa.NEEDS if not NATIVE.has(name)]
    missing = [name for name in missing if needs[name] not in x86.enable()]
    if missing:
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    return replace(targets.load("x86-64"), name=isa.NAME, mcpu=level, features=flags)


def weight(grid: str, offset: bool, n: int, k: int, group: int, whole: bool = False, seed: int = 0) -> QuantWeight:
    """Random; `whole`: scales and offsets are small powers of two, so that float32 sums are exact."""
    rng = np.random.default_rng(seed)
    size = (n, -(-k // group))
    levels, integer = GRIDS[grid].levels, GRIDS[grid].values is None
    scale = rng.choice([-0.5, 0.5, 1, 2], size) if whole else rng.uniform(-0.1, 0.1, size)
    zero = rng.integers(0, levels, size) if integer and not offset else np.zeros(size)
    offsets = (rng.choice([-4, -1, 0.5, 8], size) if whole else rng.uniform(-1, 1, size)).astype(np.float32)
    return QuantWeight(
        rng.integers(0, levels, (n, k), dtype=np.uint8), scale.astype(np.float32), zero.astype(np.int16), grid, group,
        offset=offsets if offset else None,
    )  # fmt: skip


def weight_arguments(w: QuantWeight) -> list[np.ndarray]:
    affine = [] if GRIDS[w.grid].values is not None else [w.zero if w.offset is None else w.offset]
    return [w.codes, w.scale, *affine]


def run(
    path: str, x: list[np.ndarray], w: QuantWeight, target: targets.Target, residual: np.ndarray | None = None
) -> np.ndarray:
    """One linear layer on canonical weights, packed as its kernel asks."""
    args = [*x, *weight_arguments(w), *([] if residual is None else [residual])]
    grid = GRIDS[w.grid]
    kind = "_table" if grid.values is not None else "_offset" if w.offset is not None else ""
    attrs: dict[str, int | str] = {"bits": grid.bits, "group": w.group_size}
    if grid.values is not None:
        attrs = {"grid": w.grid, **attrs}
    op = f"quern.linear_{path}{kind}{'' if residual is None else '_residual'}"
    out = TensorSpec((x[0].shape[0], w.type.n), "float32")
    request = Request(op, tuple(map(spec, args)), (out,), attrs, target, table=grid.values)
    kernel = {"int8": linear_int8.lower, "exact": linear_float.lower_exact}[path](request)
    packed = [kernel.packings[i].pack(a) if i in kernel.packings else a for i, a in enumerate(args)]
    for i, packing in kernel.packings.items():
        assert spec(packed[i]) == packing.spec
    (got,) = build(lambda _: kernel, replace(request, args=tuple(map(spec, packed))))(*packed)
    return got


def spans(w: QuantWeight, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integer activations as they are, with scale 1."""
    source = Geometry(w.type.k, w.group_size).source
    q = np.where(source >= 0, values[:, source], 0).astype(np.int8)
    return q, np.ones(q.shape[:2], np.float32), q.sum(-1, dtype=np.int32)


def exact_terms(w: QuantWeight, q: np.ndarray, asum: np.ndarray) -> np.ndarray:
    """f64[m, n, spans]: what each span adds for activations of scale 1, without the value of one level."""
    g = Geometry(w.type.k, w.group_size)
    integers = np.where(g.source >= 0, integer_form(w)[0][:, g.source], 0).astype(np.int64)
    dot = np.einsum("msi,nsi->mns", q.astype(np.int64), integers)
    dot -= w.zero[:, g.weight_group].astype(np.int64)[None] * asum[:, None]
    terms = dot * w.scale[:, g.weight_group].astype(np.float64)
    if w.offset is not None:
        terms += w.offset[:, g.weight_group] * asum[:, None].astype(np.float64)
    return terms


@pytest.mark.parametrize("kind", [Storage(2), Storage(2, 1), Storage(4), Storage(4, 1), Storage(4, 2), Storage(8)])
@pytest.mark.parametrize(("k", "group"), [(96, 32), (172, 60), (64, 64), (70, 32)])
def test_packing_loses_nothing(kind: Storage, k: int, group: int) -> None:
    geometry = Geometry(k, group)
    codes = np.random.default_rng(0).integers(0, 1 << kind.bits, (37, k), dtype=np.uint8)
    if geometry.width % kind.inputs:
        return
    packing = packed.code_packing(37, geometry, kind)
    stored = packing.pack(codes)
    assert spec(stored) == packing.spec
    assert stored.nbytes * 8 == packed.blocks(37) * 16 * geometry.spans * geometry.width * kind.bits
    assert np.array_equal(packed.unpack_codes(stored, 37, geometry, kind), codes)


def test_the_narrowest_storage_that_fits() -> None:
    chosen = {(bits, width): storage.choose(bits, width).name for bits in (2, 3, 4, 5, 6, 8) for width in (16, 24, 32)}
    assert chosen == {
        (2, 16): "w2", (2, 24): "w4", (2, 32): "w2", (3, 16): "w4", (3, 24): "w4", (3, 32): "w2p1",
        (4, 16): "w4", (4, 24): "w4", (4, 32): "w4", (5, 16): "w4p2", (5, 24): "w8", (5, 32): "w4p1",
        (6, 16): "w4p2", (6, 24): "w8", (6, 32): "w4p2", (8, 16): "w8", (8, 24): "w8", (8, 32): "w8",
    }  # fmt: skip


@by_isa
@by_case
def test_integers_are_exact(isa: Any, case: Any) -> None:
    """Scales are powers of two, so that every partial sum of an integer grid is a small multiple of a half."""
    grid, offset, m, n, k, group = case
    target = on(isa)
    w = weight(grid, offset, n, k, group, whole=True)
    q, scale, asum = spans(w, np.random.default_rng(1).integers(-QMAX, QMAX + 1, (m, k)))
    terms = exact_terms(w, q, asum)
    want, unit = terms.sum(-1), 1.0
    if GRIDS[grid].values is not None:  # powers of two times the value of one level: one rounding each span
        unit = float(GRIDS[grid].unit)
    got = run("int8", [q, scale, asum], w, target)
    if unit == 1:
        assert np.array_equal(got, want.astype(np.float32))
    else:
        assert (np.abs(got - want * unit) <= 2 * terms.shape[-1] * EPS32 * np.abs(terms * unit).sum(-1)).all()


@by_isa
@pytest.mark.parametrize("grid", list(GRIDS))
def test_no_accumulator_overflows(isa: Any, grid: str) -> None:
    """All codes at an end, all activations at an end or alternating: what int16 sums must hold at worst."""
    target, k = on(isa), 128
    levels = GRIDS[grid].levels
    even, pairs = np.arange(k) % 2 == 0, np.arange(k) // 2 % 2 == 0
    signs = np.stack([np.ones(k), -np.ones(k), np.where(even, 1, -1), np.where(pairs, 1, -1)])
    one = np.ones((16, 1), np.float32)
    for code in {0, levels - 1, levels // 2, 3}:
        codes = np.full((16, k), code, np.uint8)
        w = QuantWeight(codes, one, np.zeros((16, 1), np.int16), grid, k)
        q, scale, asum = spans(w, QMAX * signs)
        want = exact_terms(w, q, asum).sum(-1)
        got = run("int8", [q, scale, asum], w, target)
        assert np.array_equal(got, (want.astype(np.float32) * GRIDS[grid].unit if GRIDS[grid].values else want))


@by_case
def test_all_instruction_sets_agree_to_the_bit(case: Any) -> None:
    grid, offset, m, n, k, group = case
    w = weight(grid, offset, n, k, group)
    x = np.random.default_rng(2).standard_normal((m, k)).astype(np.float32)
    args: list[np.ndarray] = list(quantize_activations(x, Geometry(k, group).source))
    results = []
    for isa in ISAS:
        try:
            target = on(isa)
        except pytest.skip.Exception:
            continue
        results.append(run("int8", args, w, target, np.ones((m, n), np.float32)))
    for other in results[1:]:
        assert np.array_equal(results[0], other)


@by_case
def test_exact_path_against_the_reference(case: Any) -> None:
    grid, offset, m, n, k, group = case
    w = weight(grid, offset, n, k, group)
    x = np.random.default_rng(3).standard_normal((m, k)).astype(np.float32)
    residual = np.random.default_rng(4).standard_normal((m, n)).astype(np.float32)
    got = run("exact", [x], w, NATIVE, residual)
    want = matmul_exact(x, w).astype(np.float64) + residual
    parts = np.abs(w.scale[:, np.arange(k) // group] * GRIDS[grid].table[w.codes])
    if w.offset is not None:
        parts += np.abs(w.offset[:, np.arange(k) // group])
    magnitude = np.abs(x) @ np.maximum(parts, np.abs(dequantize(w))).T + np.abs(residual)
    # A weight has two roundings, its product one, every sum one.
    assert (np.abs(got - want) <= (k + 6) * EPS32 * magnitude).all()
