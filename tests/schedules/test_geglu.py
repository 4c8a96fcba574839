from __future__ import annotations

from math import pi, sqrt

import numpy as np
import pytest

from schedules import geglu, quantize
from schedules.geometry import Geometry
from schedules.kernel import TensorSpec
from schedules.vector import EXP2_ERROR
from tests.schedules.kernels import EPS32, NATIVE, RUNNABLE, build, request
from tests.schedules.test_quantize import outputs
from tests.schedules.test_swiglu import samples


def exponent(gate: np.ndarray) -> np.ndarray:
    """2 u in float64."""
    return 2 * sqrt(2 / pi) * (gate + 0.044715 * gate**3)


def oracle(x: np.ndarray) -> np.ndarray:
    gate, up = np.split(x.astype(np.float64), 2, axis=1)
    return gate / (1 + np.exp(np.minimum(-exponent(gate), 700))) * up


def tolerance(x: np.ndarray) -> np.ndarray:
    """As of SwiGLU, with 2 |u| in place of |gate|, which five operations made."""
    gate, up = np.split(np.abs(x.astype(np.float64)), 2, axis=1)
    relative = np.minimum(exponent(gate), 88) * 5 * EPS32 + EXP2_ERROR + 3 * EPS32
    return np.abs(oracle(x)) * relative + gate * up * 2.0**-126 + 2.0**-149


def plain(m: int, f: int, target):
    x = np.zeros((m, 2 * f), np.float32)
    return build(geglu.lower, request("quern.geglu", [x], [TensorSpec((m, f), "float32")], target))


def test_known_values():  # gelu_tanh(1) = 0.841192, gelu_tanh(-2) = -0.0454023
    (got,) = plain(1, 2, NATIVE)(np.array([[1, -2, 10, 100]], np.float32))
    assert got[0].tolist() == pytest.approx([8.41192, -4.54023], rel=1e-5)


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize(("m", "f"), [(1, 37), (3, 172)])
def test_against_float64(m, f, target):
    kernel = plain(m, f, target)
    for name, x in samples(m, f).items():
        assert (np.abs(kernel(x)[0] - oracle(x)) <= tolerance(x)).all(), name


def test_fused_equals_geglu_then_quantize():
    m, f, group = 2, 172, 43
    x, outs = np.zeros((m, 2 * f), np.float32), outputs(m, Geometry(f, group))
    fused = build(geglu.lower, request("quern.geglu_quantize", [x], outs, NATIVE, group=group))
    between = np.zeros((m, f), np.float32)
    then = build(quantize.lower, request("quern.quantize", [between], outs, NATIVE, group=group))
    for name, x in samples(m, f).items():
        for got, want in zip(fused(x), then(plain(m, f, NATIVE)(x)[0]), strict=True):
            assert np.array_equal(got, want), name
