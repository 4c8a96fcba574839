from __future__ import annotations

import numpy as np
import pytest

from schedules import quantize, rms_norm
from schedules.geometry import Geometry
from schedules.kernel import TensorSpec
from tests.schedules.kernels import ARM, AVX2, EPS32, NATIVE, RUNNABLE, assert_no_heap, build, request
from tests.schedules.test_quantize import outputs

EPS = 1e-5
WIDTHS = [1, 16, 37, 64, 172, 256, 576]


def tolerance(d: int) -> float:
    """Relative. A lane of the sum adds d / 64 squares, the tree adds 7 times; the square root halves that.

    Then: mean, + eps, sqrt, 1 / root, two products, and half an ulp of eps itself.
    """
    return ((d / 64 + 8) / 2 + 6) * EPS32


def oracle(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight


def samples(m: int, d: int) -> dict[str, np.ndarray]:
    normal = np.random.default_rng(d).standard_normal((m, d)).astype(np.float32)
    outlier = normal.copy()
    outlier[:, d // 3] = 3e4
    return {
        "normal": normal,
        "zeros": np.zeros((m, d), np.float32),
        "large": normal * np.float32(1e4),
        "denormal": normal * np.float32(1e-20),  # squares are denormal
        "outlier": outlier,
    }


def plain(m: int, d: int, target):
    x, weight = np.zeros((m, d), np.float32), np.zeros(d, np.float32)
    out = [TensorSpec((m, d), "float32")]
    return build(rms_norm.lower, request("quern.rms_norm", [x, weight], out, target, eps=EPS))


def test_by_hand():  # mean of squares 12.5, so out = x / 3.5355
    (got,) = plain(1, 2, NATIVE)(np.array([[3, 4]], np.float32), np.array([1, 2], np.float32))
    assert got[0].tolist() == pytest.approx([0.848528, 2.262741], abs=2e-6)


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("m", [1, 3])
def test_against_float64(m, d, target):
    kernel, weight = plain(m, d, target), np.random.default_rng(1).standard_normal(d).astype(np.float32)
    for name, x in samples(m, d).items():
        np.testing.assert_allclose(kernel(x, weight)[0], oracle(x, weight), rtol=tolerance(d), atol=1e-37, err_msg=name)


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize(("m", "d", "group"), [(1, 256, 128), (2, 172, 172), (3, 576, 32)])
def test_fused_equals_norm_then_quantize(m, d, group, target):
    weight, outs = np.random.default_rng(2).standard_normal(d).astype(np.float32), outputs(m, Geometry(d, group))
    x = np.zeros((m, d), np.float32)
    call = request("quern.rms_norm_quantize", [x, weight], outs, target, eps=EPS, group=group)
    fused, norm = build(rms_norm.lower, call), plain(m, d, target)
    then = build(quantize.lower, request("quern.quantize", [x], outs, target, group=group))
    for name, x in samples(m, d).items():
        for got, want in zip(fused(x, weight), then(norm(x, weight)[0]), strict=True):
            assert np.array_equal(got, want), name


@pytest.mark.parametrize("target", [NATIVE, AVX2, ARM], ids=lambda t: t.name)
def test_no_heap(target):
    assert_no_heap(plain(1, 2048, target).assembly)
