from __future__ import annotations

import numpy as np
import pytest

from schedules import softcap
from schedules.kernel import TensorSpec
from schedules.vector import TANH2_ERROR
from tests.schedules.kernels import ARM, AVX2, EPS32, NATIVE, RUNNABLE, assert_no_heap, build, request


def compiled(m: int, n: int, cap: float, target):
    x = np.zeros((m, n), np.float32)
    return build(softcap.lower, request("quern.softcap", [x], [TensorSpec((m, n), "float32")], target, cap=cap))


def test_small_stay_and_large_meet_the_cap():
    (got,) = compiled(1, 5, 30.0, NATIVE)(np.array([[0, 1e-6, -1e-6, 1e9, -np.inf]], np.float32))
    assert got[0].tolist() == [0, pytest.approx(1e-6, rel=1e-6), pytest.approx(-1e-6, rel=1e-6), 30, -30]


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize(("m", "n"), [(1, 37), (3, 4096), (2, 8197)])
def test_against_float64(m, n, target):
    for cap in (0.5, 30.0):
        x = (np.random.default_rng(n).standard_normal((m, n)) * 10 ** np.linspace(-6, 2, n)).astype(np.float32)
        want = cap * np.tanh(x.astype(np.float64) / cap)
        (got,) = compiled(m, n, cap, target)(x)
        assert (np.abs(got - want) <= (TANH2_ERROR + 3 * EPS32) * np.abs(want)).all()


@pytest.mark.parametrize("target", [NATIVE, AVX2, ARM], ids=lambda t: t.name)
def test_no_call(target):
    assembly = compiled(1, 4096, 30.0, target).assembly
    assert_no_heap(assembly)
    assert not any(name in assembly for name in ("tanhf", "exp2f", "roundeven"))
