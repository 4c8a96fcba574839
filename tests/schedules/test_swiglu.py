from __future__ import annotations

import numpy as np
import pytest

from schedules import quantize, swiglu
from schedules.geometry import Geometry
from schedules.kernel import TensorSpec
from schedules.vector import EXP2_ERROR, QUOTIENT_ERROR
from tests.schedules import emulated
from tests.schedules.kernels import ARM, AVX2, EPS32, NATIVE, RUNNABLE, assert_no_heap, build, request
from tests.schedules.test_quantize import outputs

WIDTHS = [1, 16, 37, 172, 256]


def oracle(x: np.ndarray) -> np.ndarray:
    gate, up = np.split(x.astype(np.float64), 2, axis=1)
    return gate / (1 + np.exp(-np.maximum(gate, -700))) * up


def tolerance(x: np.ndarray, quotient: float = EPS32) -> np.ndarray:
    """log2 e and its product round once each, then 1 +, /, * and the polynomial. Absolute part: see the schedule."""
    gate, up = np.split(np.abs(x.astype(np.float64)), 2, axis=1)
    relative = np.minimum(gate, 88) * 2 * EPS32 + EXP2_ERROR + 2 * EPS32 + quotient
    return np.abs(oracle(x)) * relative + gate * up * 2.0**-127 + 2.0**-149


def samples(m: int, f: int) -> dict[str, np.ndarray]:
    normal = np.random.default_rng(f).standard_normal((m, 2 * f)).astype(np.float32)
    return {
        "normal": normal,
        "zeros": np.zeros((m, 2 * f), np.float32),
        "wide": normal * np.float32(30),
        "large": np.sign(normal) * np.float32(1e4),
        "denormal": normal * np.float32(1e-40),
    }


def plain(m: int, f: int, target):
    x = np.zeros((m, 2 * f), np.float32)
    return build(swiglu.lower, request("quern.swiglu", [x], [TensorSpec((m, f), "float32")], target))


def test_gate_comes_first():  # silu(1) = 0.7310586, silu(-2) = -0.2384058
    (got,) = plain(1, 2, NATIVE)(np.array([[1, -2, 10, 100]], np.float32))
    assert got[0].tolist() == pytest.approx([7.310586, -23.84058], rel=1e-6)


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize("f", WIDTHS)
@pytest.mark.parametrize("m", [1, 3])
def test_against_float64(m, f, target):
    kernel = plain(m, f, target)
    for name, x in samples(m, f).items():
        assert (np.abs(kernel(x)[0] - oracle(x)) <= tolerance(x)).all(), name


def test_against_float64_on_arm64() -> None:
    """Its quotient is a product with a reciprocal; the fused kernel makes the same numbers."""
    m, f, group = 3, 172, 172
    x = np.zeros((m, 2 * f), np.float32)
    alone = request("quern.swiglu", [x], [TensorSpec((m, f), "float32")], ARM)
    fused = request("quern.swiglu_quantize", [x], outputs(m, Geometry(f, group)), ARM, group=group)
    for name, x in samples(m, f).items():
        (got,) = emulated.run(swiglu.lower(alone), alone, [x])
        assert (np.abs(got - oracle(x)) <= tolerance(x, QUOTIENT_ERROR)).all(), name
        if name == "normal":
            then = request("quern.quantize", [got], fused.outs, NATIVE, group=group)
            there, here = emulated.run(swiglu.lower(fused), fused, [x]), build(quantize.lower, then)(got)
            assert all(map(np.array_equal, there, here))


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize(("m", "f", "group"), [(1, 256, 128), (2, 172, 172), (3, 160, 32)])
def test_fused_equals_swiglu_then_quantize(m, f, group, target):
    x, outs = np.zeros((m, 2 * f), np.float32), outputs(m, Geometry(f, group))
    fused = build(swiglu.lower, request("quern.swiglu_quantize", [x], outs, target, group=group))
    between = np.zeros((m, f), np.float32)
    then = build(quantize.lower, request("quern.quantize", [between], outs, target, group=group))
    one = plain(m, f, target)
    for name, x in samples(m, f).items():
        for got, want in zip(fused(x), then(one(x)[0]), strict=True):
            assert np.array_equal(got, want), name


@pytest.mark.parametrize("target", [NATIVE, AVX2, ARM], ids=lambda t: t.name)
def test_no_call_in_the_loop(target):
    assembly = plain(1, 2048, target).assembly
    assert_no_heap(assembly)
    assert "exp2f" not in assembly
    assert "roundeven" not in assembly
