"""add_bias and concat: plain moves and sums, equal to numpy to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from schedules import add_bias, concat
from schedules.kernel import TensorSpec
from tests.schedules.kernels import RUNNABLE, build, request


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize(("m", "a", "b"), [(1, 37, 16), (3, 64, 5)])
def test_equal_numpy(m, a, b, target):
    rng = np.random.default_rng(a)
    x, y = (rng.standard_normal((m, n)).astype(np.float32) for n in (a, b))
    bias = rng.standard_normal(a).astype(np.float32)
    call = request("quern.add_bias", [x, bias], [TensorSpec((m, a), "float32")], target)
    assert np.array_equal(build(add_bias.lower, call)(x, bias)[0], x + bias)
    call = request("quern.concat", [x, y], [TensorSpec((m, a + b), "float32")], target)
    assert np.array_equal(build(concat.lower, call)(x, y)[0], np.concatenate([x, y], axis=1))
