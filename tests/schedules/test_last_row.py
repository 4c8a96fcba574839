"""The last real row of a prompt and its span: moves, equal to the bit, whatever stands behind the real rows."""

from __future__ import annotations

import numpy as np
import pytest

from schedules import last_row
from schedules.kernel import TensorSpec
from tests.schedules.kernels import RUNNABLE, build, request


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize("d", [37, 64])
def test_the_last_real_row(d, target):
    m = 5
    x = np.random.default_rng(d).standard_normal((m, d)).astype(np.float32)
    span = np.array([7, 1], np.int32)
    copy = build(last_row.lower_row, request("quern.last_row", [x, span], [TensorSpec((1, d), "float32")], target))
    own = build(last_row.lower_span, request("quern.last_span", [span], [TensorSpec((2,), "int32")], target))
    for real in range(1, m + 1):
        span[1] = real
        assert np.array_equal(copy(x, span)[0], x[real - 1 : real])
        assert own(span)[0].tolist() == [7 + real - 1, 1]
