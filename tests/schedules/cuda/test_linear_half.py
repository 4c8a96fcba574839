"""Linear layers in fp16 on every kind of chip: emulated against float64 within a counted bound, and by their PTX."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compiler.codegen.nvrtc import DeviceCode
from compiler.quant.grids import GRIDS
from compiler.quant.ir import QuantWeight
from compiler.quant.reference import dequantize
from schedules.cuda import linear_half
from schedules.cuda.kernel import lowerings
from schedules.cuda.packed_half import Places, unpack_codes, weight_packings
from schedules.kernel import Request, TensorSpec
from targets import Target
from tests.emulator.cuda import EmulationError, hardware
from tests.schedules.cuda.kernels import ALL, NANO, ORIN, SM90, XAVIER, Emulated, check_resources
from tests.schedules.kernels import EPS32, spec
from tests.schedules.test_linear_grids import weight, weight_arguments

EPS16, SMALLEST16 = 2.0**-11, 2.0**-25  # largest relative error of an fp16 operation; absolute, near zero
# Roundings in fp16 on the way of a product to its fp32 sum: of x; of a table's value; and where products are made in
# fp16, of 8 multiply-adds and one sum (a token's kernel) or 16 and one (half2 tile). Tensor cores add in fp32.
CHAINS = {"token": 9, "tile": 17, "wmma": 0, "mma": 0}
ONE = [  # grid, offset, n, k, group, residual
    ("int4", False, 105, 256, 32, True), ("int4", False, 64, 2048, 128, False), ("int8", False, 40, 172, 43, False),
    ("int4", True, 64, 176, 16, False), ("int8", True, 33, 160, 16, True), ("int3", False, 64, 192, 96, False),
    ("int6", False, 64, 172, 172, False), ("nf4", False, 33, 128, 64, False),
]  # fmt: skip
MANY = [  # grid, offset, m, n, k, group, residual: fewer tokens than a tile, some more than one
    ("int4", False, 5, 105, 256, 32, True), ("int4", True, 40, 64, 176, 16, False),
    ("int8", False, 70, 40, 172, 43, False),
    ("nf4", False, 16, 33, 256, 128, True),
]  # fmt: skip
FAMILIES = {"tile": NANO, "wmma": XAVIER, "mma": ORIN}


def request_of(w: QuantWeight, args: list[np.ndarray], target: Target, residual: bool) -> Request:
    grid = GRIDS[w.grid]
    kind = "_table" if grid.values is not None else "_offset" if w.offset is not None else ""
    attrs: dict[str, int | str] = {"bits": grid.bits, "group": w.group_size}
    if grid.values is not None:
        attrs = {"grid": w.grid, **attrs}
    out = TensorSpec((args[0].shape[0], w.type.n), "float32")
    op = f"quern.linear_half{kind}{'_residual' if residual else ''}"
    return Request(op, tuple(map(spec, args)), (out,), attrs, target, table=grid.values)


def layer(
    w: QuantWeight, m: int, target: Target, residual: bool = False, knobs: dict[str, int] | None = None
) -> Emulated:
    args = [np.zeros((m, w.type.k), np.float32), *weight_arguments(w)]
    args += [np.zeros((m, w.type.n), np.float32)] if residual else []
    call = replace(request_of(w, args, target, residual), knobs=knobs or {})
    return Emulated(lowerings()[call.op](call), target, call.outs)


def family_of(made: Emulated) -> str:
    kind = made.kernel.name.removeprefix("linear_half_").partition("_")[0]
    return kind if kind in CHAINS else "token"


def bound(w: QuantWeight, x: np.ndarray, residual: np.ndarray, roundings: int) -> np.ndarray:
    """Sums of the absolute terms, times the roundings of each; a value that fp16 holds badly is off by SMALLEST16 times

    2^e, which is at most a quarter of the row's largest, and so is each of a chain's sums. fp32: one sum for 8 inputs.
    """
    x, group = np.abs(x.astype(np.float64)), np.arange(w.type.k) // w.group_size
    scale = np.abs(w.scale.astype(np.float64))[:, group]
    weights = np.abs(dequantize(w).astype(np.float64))
    if w.offset is not None:  # a product with code - centre, and one with offset + centre * scale
        centre = GRIDS[w.grid].levels // 2
        least = w.offset.astype(np.float64)[:, group] + centre * w.scale.astype(np.float64)[:, group]
        weights = np.abs(w.codes - float(centre)) * scale + np.abs(least)
    total = x @ weights.T
    small = x.max(1, keepdims=True) / 4 * SMALLEST16 * (weights + scale).sum(1)
    fp32 = (w.type.k / 8 + 8) * EPS32 * total + 2 * EPS32 * np.abs(residual)
    return roundings * EPS16 * total + small + fp32


def check(made: Emulated, w: QuantWeight, x: np.ndarray, residual: np.ndarray, with_residual: bool) -> None:
    (got,) = made(x, *weight_arguments(w), *([residual] if with_residual else []))
    want = x.astype(np.float64) @ dequantize(w).astype(np.float64).T + residual
    roundings = 1 + CHAINS[family_of(made)] + (GRIDS[w.grid].values is not None)
    worst = (np.abs(got - want) / np.maximum(bound(w, x, residual, roundings), 1e-300)).max()
    assert worst <= 1, f"{worst} times the bound"


def real(m: int, k: int, n: int, residual: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of very different sizes, each with an outlier, and a row of zeros where there are several."""
    rng = np.random.default_rng(m + k)
    x = (rng.standard_normal((m, k)) * 10 ** rng.uniform(-30, 3, (m, 1))).astype(np.float32)
    x[:, k // 3] *= 1000
    x[m // 2] *= m == 1
    return x, rng.standard_normal((m, n)).astype(np.float32) * np.float32(residual)


@pytest.mark.parametrize("case", ONE, ids=lambda c: "-".join(map(str, c)))
def test_one_token(case: Any) -> None:
    grid, offset, n, k, group, residual = case
    w = weight(grid, offset, n, k, group)
    made = layer(w, 1, NANO, residual)
    assert family_of(made) == "token"
    for seed in range(2):
        x, base = real(1, k, n, residual)
        check(made, w, x * np.float32(1 + seed * 1e6), base, residual)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", MANY, ids=lambda c: "-".join(map(str, c)))
def test_many_tokens(case: Any, family: str) -> None:
    grid, offset, m, n, k, group, residual = case
    w = weight(grid, offset, n, k, group)
    made = layer(w, m, FAMILIES[family], residual)
    assert family_of(made) == family
    check(made, w, *real(m, k, n, residual), residual)


@pytest.mark.parametrize(("m", "target"), [(1, SM90), (3, NANO), (3, XAVIER), (3, SM90)], ids=str)
def test_small_integers_are_exact(m: int, target: Target) -> None:
    """|code - zero| <= 15, |x| <= 8: 16 products stay below 2048, up to which fp16 has every integer."""
    w = weight("int4", False, 40, 172, 43, whole=True)
    x = np.random.default_rng(0).integers(-8, 9, (m, 172)).astype(np.float32)
    (got,) = layer(w, m, target)(x, *weight_arguments(w))
    assert np.array_equal(got, x.astype(np.float64) @ dequantize(w).astype(np.float64).T)


@pytest.mark.parametrize(("m", "target"), [(1, NANO), (2, NANO)], ids=str)
@pytest.mark.parametrize(
    ("grid", "code", "zero"), [("int8", 255, 0), ("int8", 0, 255), ("int4", 15, 0), ("int4", 0, 15)]
)
def test_no_sum_overflows(m: int, target: Target, grid: str, code: int, zero: int) -> None:
    """All codes at an end, zeros at the other, all activations equal and huge: every fp16 sum at its bound."""
    groups = (16, 2)
    w = QuantWeight(
        np.full((16, 128), code, np.uint8), np.ones(groups, np.float32), np.full(groups, zero, np.int16), grid, 64
    )
    made = layer(w, m, target)
    for size in (1.9999, 3e30):
        x = np.full((m, 128), size, np.float32)
        (got,) = made(x, *weight_arguments(w))
        np.testing.assert_allclose(got, 128.0 * (code - zero) * size, rtol=18 * EPS16)


def test_a_word_by_hand() -> None:
    """Inputs 0 to 31 hold codes that are their numbers, modulo 16: word 0 has pairs (0,1) (8,9) (16,17) (24,25)."""
    places = Places(32, 32, 4)
    codes = (np.arange(32, dtype=np.uint8) % 16)[None]
    words = weight_packings(1, 1, places, "float16", "zero")[1].pack(codes).view("<u4")
    first, second = (0, 8, 0, 8), (1, 9, 1, 9)
    assert words.shape == (64, 4)
    assert words[0, 0] == sum(v << 4 * i for i, v in enumerate(first + second))
    assert words[0, 3] == sum((v + 6) << 4 * i for i, v in enumerate(first + second))
    assert not words[1:].any()


@pytest.mark.parametrize(("k", "group", "bits"), [(172, 43, 4), (172, 43, 8), (176, 16, 4), (64, 8, 8), (704, 704, 4)])
def test_packing_loses_nothing(k: int, group: int, bits: int) -> None:
    places = Places(k, group, bits)
    codes = np.random.default_rng(k).integers(0, 1 << bits, (70, k)).astype(np.uint8)
    packing = weight_packings(1, 70, places, "float16", "zero")[1]
    packed = packing.pack(codes)
    assert spec(packed) == packing.spec
    assert np.array_equal(unpack_codes(packed, 70, places), codes)


BROKEN = {  # text of a kernel, what it becomes, and what must come of it
    "no barrier before activations are read": (
        1,
        NANO,
        "    block_sync();\n    const int end",
        "    const int end",
        EmulationError,
    ),
    "no barrier before sums are gathered": (
        1,
        NANO,
        "  block_sync();\n  if (thread < ROWS",
        "  if (thread < ROWS",
        EmulationError,
    ),
    "a wrong exchange": (1, NANO, "shuffle_xor(given, mask)", "shuffle_xor(given, mask ^ 4)", AssertionError),
    "codes not unpacked in order": (1, NANO, "j / 2 * 8 + j % 2 * 4 + t", "j / 2 * 8 + j % 2 + 2 * t", AssertionError),
    "no barrier behind a step": (
        5,
        NANO,
        "    block_sync();\n#pragma unroll\n    for (int u",
        "    for (int u",
        EmulationError,
    ),
    "copies not waited for": (5, ORIN, "async_wait<STAGES - 2>();", "", EmulationError),
    "another lane's word": (5, ORIN, "+ own_row + g) + t;", "+ own_row + g) + (t ^ 1);", AssertionError),
    "a tile's place misread": (5, XAVIER, "number % 16]", "number / 16]", AssertionError),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_kernels_are_caught(what: str) -> None:
    hardware.require_emulator()
    m, target, text, other, error = BROKEN[what]
    w = weight("int4", False, 33, 1024 if m == 1 else 256, 64)
    made = layer(w, m, target)
    assert text in made.kernel.source
    broken = replace(made, kernel=replace(made.kernel, source=made.kernel.source.replace(text, other)))
    x, residual = real(m, w.type.k, 33, False)
    with pytest.raises(error):
        check(broken, w, x, residual, False)


def with_half_scale(w: QuantWeight) -> QuantWeight:
    """The same with scales in fp16, as most checkpoints have them."""
    return QuantWeight(w.codes, w.scale.astype(np.float16), w.zero, w.grid, w.group_size, offset=w.offset)


def big(m: int, target: Target, grid: str, group: int, offset: bool = False, n: int = 4096, k: int = 4096) -> Emulated:
    """A layer of a real model's size; nobody runs it."""
    small = weight(grid, offset, 1, k, group)
    small = with_half_scale(small)
    args = [np.zeros((m, k), np.float32), *(np.broadcast_to(a, (n, a.shape[1])) for a in weight_arguments(small))]
    call = request_of(small, args, target, False)
    call = replace(call, outs=(TensorSpec((m, n), "float32"),))
    return Emulated(lowerings()[call.op](call), target, call.outs)


# Registers of a thread: 128 leave room for 512 threads on a multiprocessor, 168 for 384, 255 for 256.
BUDGETS = {"token": 128, "tile": 168, "wmma": 184, "mma": 255}


@pytest.mark.parametrize("target", ALL, ids=lambda t: t.name)
@pytest.mark.parametrize("m", [1, pytest.param(16, marks=pytest.mark.slow), 128])
@pytest.mark.parametrize(("grid", "group"), [("int4", 32), pytest.param("int8", 128, marks=pytest.mark.slow)])
def test_registers(target: Target, m: int, grid: str, group: int) -> None:
    made = big(m, target, grid, group)
    check_resources(made.code, BUDGETS[family_of(made)])


@pytest.mark.parametrize(
    ("target", "m"), [(NANO, 1), (NANO, 16), (XAVIER, 16), (ORIN, 16)], ids=lambda v: getattr(v, "name", v)
)
def test_short_groups_do_not_spill(target: Target, m: int) -> None:
    """Two scales in 32 inputs, and offsets, as Q6_K and Q2_K have them: the most that a kernel holds."""
    for grid in ("int8", "int4"):
        check_resources(big(m, target, grid, 16, offset=True, n=64, k=1024).code, 255)


def count(code: DeviceCode, instruction: str) -> int:
    return len(re.findall(rf"(?m)^\s+(?:@\S+ )?{instruction}", code.ptx.decode()))


@pytest.mark.parametrize("target", ALL, ids=lambda t: t.name)
def test_a_tokens_instructions(target: Target) -> None:
    """The loop over chunks: 8 rows x 32 weights by one 128-bit load each, 16 LOP3, 8 of code - zero, 16 of products."""
    code = big(1, target, "int4", 128).code
    assert count(code, r"ld\.global\.nc\S*\.v4\.u32") == 8 + 1 + 2  # weights, scales, activations of two pieces
    assert count(code, r"ld\.shared\.v4\.u32") == 4  # activations
    assert count(code, "lop3") == 16 * 8
    assert count(code, r"fma\.rn\.f16x2") + count(code, r"mul\.rn\.f16x2") == (8 + 16) * 8
    assert count(code, r"(?:ld|st)\.local") == 0


def test_tensor_core_instructions() -> None:
    """A warp's step: 64 inputs for 64 x 32 results by mma.m16n8k16; on Xavier 32 inputs for 32 x 32 by wmma."""
    code = big(128, ORIN, "int4", 128).code
    assert count(code, r"mma\.sync\.aligned\.m16n8k16") == 4 * 4 * 4
    assert count(code, "ldmatrix") == 4 * 4
    assert count(code, "cp.async.cg") > 0
    assert count(big(128, XAVIER, "int4", 128).code, r"wmma\.mma") == 2 * 2 * 2


@pytest.mark.parametrize("target", [NANO, SM90], ids=lambda t: t.name)
def test_knobs(target: Target) -> None:
    w = weight("int4", False, 64, 256, 32)
    call = request_of(w, [np.zeros((1, 256), np.float32), *weight_arguments(w)], target, False)
    found, plain = linear_half.space(call), linear_half.lower(call)
    found.check(found.default)
    names = {plain.name}
    for point in found.points():
        other = linear_half.lower(replace(call, knobs=point))
        names.add(other.name)
        assert {i: p.name for i, p in other.packings.items()} == {i: p.name for i, p in plain.packings.items()}
    assert len(names) > 1
    made = layer(w, 1, target, knobs=next(iter(found.points())))
    x, residual = real(1, 256, 64, False)
    check(made, w, x, residual, False)


def test_one_layout_for_all_token_counts() -> None:
    """Weights are packed once: what a prompt's kernel wants is what a token's wants, on every chip."""
    w = weight("int4", True, 64, 256, 32)
    for target in ALL:
        names = {tuple(p.name for p in layer(w, m, target).kernel.packings.values()) for m in (1, 16, 128)}
        assert len(names) == 1


def test_families() -> None:
    assert {t.name: family_of(layer(weight("int4", False, 8, 32, 32), 4, t)) for t in ALL} == {
        "jetson-nano": "tile", "jetson-xavier": "wmma", "jetson-orin": "mma", "cuda-sm90": "mma"}  # fmt: skip
