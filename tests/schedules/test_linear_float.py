"""Linear layers on fp32 activations, integer weights and dense ones: by hand, exact where integers are, and float64."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest

from compiler.quant.ir import DenseWeight, QuantWeight
from compiler.quant.reference import dequantize
from schedules import linear_float
from tests.schedules.kernels import ARM, AVX2, NATIVE, RUNNABLE, assert_no_heap, widest_register
from tests.schedules.linears import Layer, Shape, compiled, exact_weight, shapes, weight, within

EXACT = [s for s in shapes() if s.group in (8, 43, 128, 704)]
STORAGE = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}
DENSE = [  # m, n, k, residual: full and half-filled row blocks, k with and without a factor of 8, primes
    (1, 16, 64, False), (1, 105, 172, True), (3, 1, 8, True), (3, 344, 43, False), (16, 105, 704, True),
    (7, 32, 1, False),
]  # fmt: skip

on_targets = pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)


def arguments(shape: Shape, w: QuantWeight, x: np.ndarray, residual: np.ndarray) -> list[np.ndarray]:
    return [x, w.codes, w.scale, w.zero, *([residual] if shape.residual else [])]


def residual_of(m: int, n: int, used: bool) -> np.ndarray:
    values = np.random.default_rng(3).integers(-1000, 1000, (m, n)).astype(np.float32)
    return values if used else np.zeros_like(values)


@cache
def exact_layer(shape: Shape, target: Any) -> Layer:
    x, residual = np.zeros((shape.m, shape.k), np.float32), np.zeros((shape.m, shape.n), np.float32)
    op = f"quern.linear_exact{'_residual' if shape.residual else ''}"
    args = arguments(shape, weight(shape), x, residual)
    return compiled(linear_float.lower_exact, op, args, shape.n, target, bits=shape.bits, group=shape.group)


@cache
def dense_layer(m: int, n: int, k: int, residual: bool, dtype: str, target: Any) -> Layer:
    args = [np.zeros((m, k), np.float32), np.zeros((n, k), STORAGE[dtype])]
    op = f"quern.linear_dense{'_residual' if residual else ''}"
    more = [np.zeros((m, n), np.float32)] if residual else []
    return compiled(linear_float.lower_dense, op, [*args, *more], n, target)


def dense_weight(n: int, k: int, dtype: str) -> DenseWeight:
    """Normal values as the storage rounds them (bfloat16: cuts them off)."""
    values = np.random.default_rng(5).standard_normal((n, k)).astype(np.float32)
    if dtype == "bfloat16":
        return DenseWeight((values.view(np.uint32) >> 16).astype(np.uint16), dtype)
    return DenseWeight(values.astype(STORAGE[dtype]), dtype)


def test_one_row_by_hand() -> None:  # groups of 2: -4 * 1 + 3.5 * 2 = 3; -8 * 0.5 - 1 * 3 = -7; -12 * -1 = 12
    w = QuantWeight(np.array([[0, 15, 8, 1, 9]], np.uint8), np.array([[0.5, -1, 2]], np.float16),
                    np.array([[8, 0, 15]], np.int16), "int4", 2)  # fmt: skip
    shape, x = Shape(4, 1, 1, 5, 2, "float16", False), np.array([[1, 2, 0.5, 3, -1]], np.float32)
    assert exact_layer(shape, NATIVE)(*arguments(shape, w, x, x)).tolist() == [[8.0]]


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float16", 0x3E00), ("bfloat16", 0x3FC0), ("float32", 0x3FC00000)]
)  # 1.5 in each
def test_dense_bits_by_hand(dtype: str, stored: int) -> None:
    unsigned: Any = np.uint32 if dtype == "float32" else np.uint16
    weights = np.array([[stored, 0]], unsigned).view(STORAGE[dtype])
    layer = dense_layer(1, 1, 2, True, dtype, NATIVE)
    assert layer(np.array([[-2, 7]], np.float32), weights, np.array([[10]], np.float32)).tolist() == [[7.0]]


@on_targets
@pytest.mark.parametrize("shape", EXACT, ids=str)
def test_exact_is_exact_on_integers(shape: Shape, target: Any) -> None:
    """Whole activations up to 15 and scales that are powers of two: partial sums are multiples of 1/2 below 2**23."""
    w, residual = exact_weight(shape), residual_of(shape.m, shape.n, shape.residual)
    x = np.random.default_rng(2).integers(-15, 16, (shape.m, shape.k)).astype(np.float32)
    assert 15 * np.abs(dequantize(w)).sum(1).max() + 1000 < 2**23
    want = x.astype(np.float64) @ dequantize(w).astype(np.float64).T + residual
    assert np.array_equal(exact_layer(shape, target)(*arguments(shape, w, x, residual)), want)


@on_targets
@pytest.mark.parametrize("shape", EXACT, ids=str)
def test_exact_against_float64(shape: Shape, target: Any) -> None:
    w, residual, g = weight(shape), residual_of(shape.m, shape.n, shape.residual), shape.geometry
    x = np.random.default_rng(4).standard_normal((shape.m, shape.k)).astype(np.float32)
    scale = w.scale.astype(np.float64)[:, np.arange(shape.k) // shape.group]
    centred = w.codes.astype(np.float64) - w.zero[:, np.arange(shape.k) // shape.group]
    want = x.astype(np.float64) @ (scale * centred).T + residual
    magnitude = np.abs(x.astype(np.float64)) @ np.abs(scale * centred).T + np.abs(residual)
    # A product, a sum over at most `width` of them, times scale, a sum over spans, the residual.
    roundings = 1 + g.width + 1 + g.spans + 1
    within(exact_layer(shape, target)(*arguments(shape, w, x, residual)), want, magnitude, roundings)


@on_targets
@pytest.mark.parametrize("bits", [2, 3, 6])
def test_narrow_codes(bits: int, target: Any) -> None:
    shape = Shape(bits, 3, 40, 72, 24, "float16", residual=False)
    w, x = exact_weight(shape), np.random.default_rng(2).integers(-15, 16, (3, 72)).astype(np.float32)
    want = x @ dequantize(w).T
    assert np.array_equal(exact_layer(shape, target)(*arguments(shape, w, x, x)), want)


@on_targets
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(("m", "n", "k", "residual"), DENSE)
def test_dense_against_float64(m: int, n: int, k: int, residual: bool, dtype: str, target: Any) -> None:
    w, base = dense_weight(n, k, dtype), residual_of(m, n, residual)
    x = np.random.default_rng(4).standard_normal((m, k)).astype(np.float32)
    values = dequantize(w).astype(np.float64)
    want = x.astype(np.float64) @ values.T + base
    magnitude = np.abs(x.astype(np.float64)) @ np.abs(values).T + np.abs(base)
    got = dense_layer(m, n, k, residual, dtype, target)(x, w.values, *([base] if residual else []))
    within(got, want, magnitude, roundings=1 + k + 1)  # a product, at most k sums in whatever order, the residual


@on_targets
@pytest.mark.parametrize("dtype", STORAGE)
def test_every_dense_value_is_read_exactly(dtype: str, target: Any) -> None:
    """One input, x = 1: each of 65 536 (float32: 65 536 bit patterns of all sizes) comes out as it is stored."""
    patterns = np.arange(1 << 16, dtype=np.uint32)
    if dtype == "float16":
        stored = patterns.astype(np.uint16).view(np.float16)
    elif dtype == "bfloat16":
        stored = patterns.astype(np.uint16)
    else:
        stored = (patterns << 16 | 0x1234).view(np.float32)
    want = dequantize(DenseWeight(stored[:, None], dtype))[:, 0]
    with np.errstate(invalid="ignore"):
        normal = np.isfinite(want) & ((np.abs(want) >= 2.0**-126) | (want == 0))  # subnormal float32 may be flushed
    stored, want = stored[normal], want[normal]
    layer = dense_layer(1, len(stored), 1, False, dtype, target)
    assert np.array_equal(layer(np.ones((1, 1), np.float32), stored[:, None])[0], want)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    shape = Shape(4, 16, 105, 172, 43, "float16", residual=False)
    one, w = replace(shape, m=1), weight(shape)
    x = np.random.default_rng(4).standard_normal((16, 172)).astype(np.float32)
    together = exact_layer(shape, NATIVE)(*arguments(shape, w, x, x))
    alone = [exact_layer(one, NATIVE)(*arguments(one, w, row[None], row[None]))[0] for row in x]
    assert np.array_equal(together, alone)


@pytest.mark.parametrize(("m", "k"), [(16, 172), (5, 43)])
def test_nor_does_it_with_dense_weights(m: int, k: int) -> None:
    w, x = dense_weight(105, k, "float16").values, np.random.default_rng(4).standard_normal((m, k)).astype(np.float32)
    together = dense_layer(m, 105, k, False, "float16", NATIVE)(x, w)
    alone = [dense_layer(1, 105, k, False, "float16", NATIVE)(row[None], w)[0] for row in x]
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("target", [NATIVE, AVX2, ARM], ids=lambda t: t.name)
@pytest.mark.parametrize(("m", "dtype"), product((1, 16), STORAGE))
def test_dense_is_vector_code(m: int, dtype: str, target: Any) -> None:
    assembly = dense_layer(m, 344, 704, True, dtype, target).built.assembly
    assert {"zmm": 512, "ymm": 256, "v0": 128}[widest_register(assembly)] == target.vector_bits
    assert_no_heap(assembly)
    assert not re.search(r"\t(bl|call\w*)\t__\w*(hf|h2f)", assembly)  # no call to widen a float16


@pytest.mark.parametrize("target", [NATIVE, AVX2, ARM], ids=lambda t: t.name)
@pytest.mark.parametrize(("m", "bits"), product((1, 16), (4, 8)))
def test_exact_is_vector_code(m: int, bits: int, target: Any) -> None:
    assembly = exact_layer(Shape(bits, m, 344, 704, 128, "float16", residual=True), target).built.assembly
    assert {"zmm": 512, "ymm": 256, "v0": 128}[widest_register(assembly)] == target.vector_bits
    assert_no_heap(assembly)
    assert not re.search(r"\t(bl|call\w*)\t__\w*(hf|h2f)", assembly)
