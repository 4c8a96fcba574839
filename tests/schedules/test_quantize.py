from __future__ import annotations

import numpy as np
import pytest

from schedules import quantize
from schedules.geometry import Geometry
from schedules.kernel import TensorSpec
from tests.schedules.kernels import ARM, AVX2, NATIVE, RUNNABLE, assert_no_heap, build, request, widest_register

SHAPES = [  # k, group: dense, short last group, parts of a group, parts of unequal length, groups below a vector
    (256, 128), (64, 64), (172, 128), (172, 32), (172, 172), (200, 100), (576, 576), (129, 129), (385, 385),
    (60, 7), (37, 1),
]  # fmt: skip


def outputs(m: int, geometry: Geometry) -> list[TensorSpec]:
    shape = (m, geometry.spans)
    return [
        TensorSpec((*shape, geometry.width), "int8"),
        TensorSpec(shape, "float32"),
        TensorSpec(shape, "int32"),
    ]


def reference(x: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The kernel's definition in numpy float32, operation for operation."""
    place = geometry.source
    spans = np.where(place >= 0, x[:, np.maximum(place, 0)], np.float32(0))
    amax = np.abs(spans).max(-1)
    some = amax >= np.float32(quantize.SMALLEST)
    inverse = np.where(some, np.float32(127) / np.where(some, amax, np.float32(1)), np.float32(0))
    q = np.rint(spans * inverse[..., None]).astype(np.int8)
    return q, np.where(some, amax / np.float32(127), np.float32(0)), q.sum(-1, dtype=np.int32)


def compiled(m: int, k: int, group: int, target):
    x = np.zeros((m, k), np.float32)
    return build(quantize.lower, request("quern.quantize", [x], outputs(m, Geometry(k, group)), target, group=group))


def samples(m: int, k: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(k)
    normal = rng.standard_normal((m, k)).astype(np.float32)
    outlier = normal.copy()
    outlier[:, k // 2] = 1e4
    halves = rng.integers(-127, 127, (m, k)).astype(np.float32) + np.float32(0.5)
    halves[:, 0] = 127  # with amax 127 every x * 1 is exactly a half
    return {
        "normal": normal,
        "zeros": np.zeros((m, k), np.float32),
        "negative zeros": -np.zeros((m, k), np.float32),
        "large": normal * np.float32(1e4),
        "outlier": outlier,
        "halves": halves,
        "denormal": (normal * np.float32(1e-40)).astype(np.float32),
        "near smallest": normal * np.float32(quantize.SMALLEST),
        "huge": normal * np.float32(5e37),
    }


def test_one_span_by_hand():  # amax 254: scale 2, q = x / 2 with halves to even
    (q,), (scale,), (total,) = compiled(1, 8, 8, NATIVE)(np.array([[254, -254, 1, 3, 5, -1, -3, 0]], np.float32))
    assert q.tolist() == [[127, -127, 0, 2, 2, 0, -2, 0]]
    assert (scale.tolist(), total.tolist()) == ([2.0], [2])


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize(("k", "group"), SHAPES)
@pytest.mark.parametrize("m", [1, 3])
def test_equals_float32_definition(m, k, group, target):
    kernel = compiled(m, k, group, target)
    for name, x in samples(m, k).items():
        for got, want in zip(kernel(x), reference(x, Geometry(k, group)), strict=True):
            assert np.array_equal(got, want), name


def test_runs_cover_every_span_once():
    for k, group in SHAPES:
        geometry = Geometry(k, group)
        covered = np.full((geometry.spans, geometry.width), -1)
        for run in quantize.runs(geometry):
            for i in range(run.spans):
                covered[run.first + i, : run.length] = np.arange(run.length) + run.start + i * run.stride
        assert np.array_equal(covered, geometry.source)


@pytest.mark.parametrize("target", [NATIVE, AVX2, ARM], ids=lambda t: t.name)
def test_span_stays_in_registers(target):
    assembly = compiled(1, 2048, 128, target).assembly
    assert_no_heap(assembly)
    assert {"zmm": 512, "ymm": 256, "v0": 128}[widest_register(assembly)] == target.vector_bits
