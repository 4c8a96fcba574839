from __future__ import annotations

import numpy as np
import pytest

import targets
from compiler.codegen import nvrtc
from schedules.cuda import linear_int8
from tests.schedules.cuda.linears import lowered, run
from tests.schedules.test_linear_grids import CASES, exact_terms, spans, weight
from compiler.quant.grids import GRIDS

GPUS = ["jetson-nano", "jetson-xavier", "jetson-orin", "cuda-sm90"]
ORIN = targets.load("jetson-orin")


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_exact(case):
    grid, offset, m, n, k, group = case
    w = weight(grid, offset, n, k, group, whole=True)
    values = np.random.default_rng(1).integers(-127, 128, (m, k))
    act = spans(w, values)
    kernel = lowered(linear_int8.lower, act, w, ORIN)
    got = run(kernel, act, w)
    want = exact_terms(w, act[0], act[2]).sum(-1)
    if GRIDS[grid].values is not None:
        want = want * np.float64(GRIDS[grid].unit)
        assert np.allclose(got, want, rtol=1e-5, atol=1e-4)
    else:
        assert np.array_equal(got, want)


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("case", [("int4", False, 1, 2048, 4096, 128), ("int4", False, 1, 2048, 4096, 32), ("int4", True, 1, 2048, 2048, 32), ("nf4", False, 1, 2048, 2048, 64), ("int8", False, 1, 2048, 2048, 128), ("int4", False, 4, 2048, 2048, 128)], ids=lambda c: "-".join(map(str, c)))
def test_budget(case, name):
    grid, offset, m, n, k, group = case
    w = weight(grid, offset, n, k, group)
    act = spans(w, np.zeros((m, k)))
    t = targets.load(name)
    kernel = lowered(linear_int8.lower, act, w, t)
    code = nvrtc.compile(kernel.source, t.gpu)
    print(name, case, code.functions)
