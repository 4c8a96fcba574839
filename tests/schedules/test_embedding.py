from __future__ import annotations

import numpy as np
import pytest

from schedules import embedding
from schedules.kernel import TensorSpec
from tests.schedules.kernels import RUNNABLE, build, request


def widen(table: np.ndarray) -> np.ndarray:
    if table.dtype == np.uint16:
        return (table.astype(np.uint32) << 16).view(np.float32)
    return table.astype(np.float32)


def run(ids: np.ndarray, table: np.ndarray, target) -> np.ndarray:
    out = TensorSpec((len(ids), table.shape[1]), "float32")
    (got,) = build(embedding.lower, request("quern.embedding", [ids, table], [out], target))(ids, table)
    return got


def test_bfloat16_by_hand():  # 0x3F80 is 1, 0xC040 is -3
    table = np.array([[0, 0], [0x3F80, 0xC040]], np.uint16)
    assert run(np.array([1], np.int32), table, RUNNABLE[0]).tolist() == [[1.0, -3.0]]


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", ["float16", "uint16", "float32"])
@pytest.mark.parametrize(("m", "d"), [(1, 1), (1, 172), (5, 37), (3, 64)])
def test_rows_are_exact(m, d, dtype, target):
    rng = np.random.default_rng(d)
    bits = rng.integers(0, 1 << 16, (11, d), dtype=np.uint16)
    finite = np.where((bits & 0x7C00) == 0x7C00, 1, bits).astype(np.uint16)  # denormals stay, infinities and NaN go
    table = {"uint16": finite, "float16": finite.view(np.float16), "float32": rng.standard_normal((11, d)).astype("f4")}
    ids = rng.integers(0, 11, m).astype(np.int32)
    assert np.array_equal(run(ids, table[dtype], target), widen(table[dtype])[ids])
