from __future__ import annotations

import numpy as np
import pytest

import targets
from compiler.codegen import nvrtc
from compiler.quant.grids import GRIDS
from schedules.cuda import linear_int8_mma, linear_int8_wmma
from tests.schedules.cuda.linears import lowered, run
from tests.schedules.test_linear_grids import exact_terms, spans, weight

ORIN = targets.load("jetson-orin")
CASES = [
    ("int4", False, 70, 136, 256, 128), ("int4", True, 17, 131, 96, 32), ("int4", False, 5, 33, 172, 43),
    ("int8", False, 33, 72, 256, 128), ("int8", True, 6, 33, 172, 43), ("nf4", False, 16, 40, 128, 64), ("int6", False, 9, 16, 24, 8),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
@pytest.mark.parametrize("mod,name", [(linear_int8_mma, "jetson-orin"), (linear_int8_wmma, "jetson-xavier")])
def test_exact(case, mod, name):
    ORIN = targets.load(name)
    grid, offset, m, n, k, group = case
    w = weight(grid, offset, n, k, group, whole=True)
    values = np.random.default_rng(1).integers(-127, 128, (m, k))
    act = spans(w, values)
    residual = np.random.default_rng(3).integers(-1000, 1000, (m, n)).astype(np.float32)
    kernel = lowered(mod.lower, act, w, ORIN, residual=residual)
    got = run(kernel, act, w, residual)
    want = exact_terms(w, act[0], act[2]).sum(-1)
    if GRIDS[grid].values is not None:
        want = want * np.float64(GRIDS[grid].unit) + residual
        assert np.allclose(got, want, rtol=1e-5, atol=1e-2)
    else:
        assert np.array_equal(got, want + residual)


@pytest.mark.parametrize("name", ["jetson-orin", "cuda-sm90", "jetson-xavier"])
@pytest.mark.parametrize("case", [("int4", False, 128, 2048, 2048, 128), ("int4", False, 128, 2048, 2048, 32), ("nf4", False, 64, 2048, 2048, 64), ("int8", False, 128, 2048, 2048, 128), ("int4", True, 16, 2048, 2048, 128)], ids=lambda c: "-".join(map(str, c)))
def test_budget(case, name):
    grid, offset, m, n, k, group = case
    w = weight(grid, offset, n, k, group)
    act = spans(w, np.zeros((m, k)))
    t = targets.load(name)
    kernel = lowered((linear_int8_wmma if 'xavier' in name else linear_int8_mma).lower, act, w, t)
    code = nvrtc.compile(kernel.source, t.gpu)
    print(name, case, kernel.launches[0].grid, kernel.launches[0].shared_bytes, code.functions)
