"""The portable kernels with RISC-V's vector extension, under qemu: to the bit what this machine gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import targets
from schedules import rms_norm
from schedules.kernel import TensorSpec, lowerings
from tests.schedules import emulated
from tests.schedules.kernels import NATIVE, build
from tests.schedules.kernels import request as plain
from tests.schedules.test_linear_grids import weight
from tests.schedules.test_linear_int8_widening import arguments, here, request

BOARD = targets.load("riscv64-v")


CASES = [("int4", 1, 16, 128, 64), ("int3", 2, 33, 64, 32), ("nf4", 3, 16, 172, 43)]


@pytest.mark.parametrize(("case", "scale"), [(CASES[0], "float16"), *((case, "float32") for case in CASES)], ids=str)
def test_linear_layers(case: Any, scale: str) -> None:
    grid, m, n, k, group = case
    w = weight(grid, False, n, k, group)
    w = replace(w, scale=w.scale.astype(scale))
    x = np.random.default_rng(2).standard_normal((m, k)).astype(np.float32)
    args = arguments(x, w)
    call = replace(request(args, w, False), target=BOARD)
    kernel = lowerings()[call.op](call)
    assert kernel.name.startswith(f"linear_{'nf4' if grid == 'nf4' else 'w2p1' if grid == 'int3' else 'w4'}a8_generic")
    (got,) = emulated.run(kernel, call, args)
    assert np.array_equal(got, here(args, w, False))


def test_a_norm_and_its_vector_instructions() -> None:
    x = np.random.default_rng(1).standard_normal((2, 70)).astype(np.float32)
    call = plain("quern.rms_norm", [x, np.ones(70, np.float32)], [TensorSpec(x.shape, "float32")], BOARD, eps=1e-5)
    args = [x, np.linspace(0.5, 2, 70, dtype=np.float32)]
    kernel = rms_norm.lower(call)
    (got,) = emulated.run(kernel, call, args)
    (want,) = build(rms_norm.lower, replace(call, target=NATIVE))(*args)
    assert np.array_equal(got, want)
    assert "vfmul.v" in build(rms_norm.lower, call).assembly
