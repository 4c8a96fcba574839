"""The definition, worked by hand; the integer path against the exact one, with the error it may have."""
from __future__ import annotations

import numpy as np
import pytest

from compiler.quant.grids import GRIDS, IQ4_NL
from compiler.quant.ir import DenseWeight, QuantWeight
from compiler.quant.reference import dequantize, matmul_exact, matmul_int8, quantize_activations
from schedules.geometry import Geometry


def random_weight(n: int, k: int, group_size: int, seed: int = 0, permuted: bool = False) -> QuantWeight:
    rng = np.random.default_rng(seed)
    groups = -(-k // group_size)
    return QuantWeight(rng.integers(0, 16, (n, k), dtype=np.uint8), rng.random((n, groups)).astype(np.float16),
                       rng.integers(0, 16, (n, groups)).astype(np.int16), "int4", group_size,
                       rng.permutation(k).astype(np.int32) if permuted else None)


def test_dequantize_by_hand() -> None:  # groups of 2, the last short: scale * (code - zero)
    w = QuantWeight(np.array([[0, 15, 8, 1, 9]], np.uint8), np.array([[0.5, -1, 2]], np.float16),
                    np.array([[8, 0, 15]], np.int16), "int4", 2)
    assert dequantize(w).tolist() == [[-4, 3.5, -8, -1, -12]]


def test_table_grid_and_offset_by_hand() -> None:  # nf4: code 0 is -1, 7 is 0, 15 is 1; fp4: code 3 is 1, 13 is -1/2
    codes, ones = np.array([[0, 7, 15]], np.uint8), np.ones((1, 1), np.float16)
    zero = np.zeros((1, 1), np.int16)
    assert dequantize(QuantWeight(codes, 2 * ones, zero, "nf4", 3)).tolist() == [[-2, 0, 2]]
    fp4 = QuantWeight(np.array([[3, 13, 8]], np.uint8), 2 * ones, zero, "fp4", 3)
    assert dequantize(fp4).tolist() == [[2, -1, 0]]
    w = QuantWeight(codes, ones / 2, zero, "int4", 3, offset=np.array([[-0.25]], np.float32))
    assert dequantize(w).tolist() == [[-0.25, 3.25, 7.25]]


def test_int8_levels_by_hand() -> None:
    assert GRIDS["nf4"].int8_levels.tolist() == [
        -127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127]
    assert GRIDS["fp4"].int8_levels.tolist() == [0, 1, 85, 127, 42, 64, 21, 32, 0, -1, -85, -127, -42, -64, -21, -32]
    assert GRIDS["iq4_nl"].int8_levels.tolist() == list(IQ4_NL)
    assert GRIDS["iq4_nl"].unit == 1


def test_permuted_columns_go_back_to_their_inputs() -> None:  # stored column j is input permutation[j]
    w = QuantWeight(np.array([[1, 2, 3]], np.uint8), np.ones((1, 3), np.float16), np.zeros((1, 3), np.int16), "int4", 1,
                    np.array([2, 0, 1], np.int32))
    assert dequantize(w).tolist() == [[2, 3, 1]]


def test_dense_by_hand() -> None:
    assert dequantize(DenseWeight(np.array([[0x3F80, 0xC000]], np.uint16), "bfloat16")).tolist() == [[1, -2]]
    assert dequantize(DenseWeight(np.array([[1.5]], np.float16), "float16")).dtype == np.float32


def test_quantize_activations_by_hand() -> None:
    geometry = Geometry(5, 4)  # two spans of 4, stored 8 wide; the second has one input
    x = np.array([[127, -63.4, 0.5, 1.5, -2]], np.float32)
    q, scale, total = quantize_activations(x, geometry.source)
    assert q.tolist() == [[[127, -63, 0, 2, 0, 0, 0, 0], [-127, 0, 0, 0, 0, 0, 0, 0]]]  # ties go to the even neighbour
    assert scale.tolist() == [[1.0, float(np.float32(2) / np.float32(127))]]
    assert total.tolist() == [[66, -127]]
    assert [str(part.dtype) for part in (q, scale, total)] == ["int8", "float32", "int32"]


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-45])
def test_silence_stays_silent(value: float) -> None:
    q, scale, total = quantize_activations(np.full((1, 8), value, np.float32), Geometry(8, 8).source)
    assert not q.any()
    assert not total.any()
    assert np.isfinite(scale).all()


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("k", "group_size"), [(64, 32), (40, 16), (300, 128), (256, 256), (172, 172), (50, 7)])
def test_the_integer_path_is_exact_but_for_rounded_activations(k: int, group_size: int, permuted: bool) -> None:
    rng = np.random.default_rng(1)
    w = random_weight(6, k, group_size, permuted=permuted)
    x = rng.standard_normal((3, k)).astype(np.float32)
    geometry = Geometry(k, group_size)
    got = matmul_int8(x, w, geometry.source, geometry.weight_group)
    # Each activation is off by at most half a step, amax / 254; 1e-6 covers the float32 rounding of scales and result.
    half_step = np.abs(x).max(axis=1)[:, None] / 254
    bound = half_step * np.abs(dequantize(w)).sum(axis=1)[None] * (1 + 1e-5) + 1e-6
    assert (np.abs(got - matmul_exact(x, w)) <= bound).all()


def test_activations_that_are_already_integers_lose_nothing() -> None:  # amax 127, so scale 1: both paths agree
    rng = np.random.default_rng(2)
    w = random_weight(4, 64, 32)
    x = rng.integers(-127, 128, (2, 64)).astype(np.float32)
    x[:, ::32] = 127
    geometry = Geometry(64, 32)
    assert np.array_equal(matmul_int8(x, w, geometry.source, geometry.weight_group), matmul_exact(x, w))
