"""Act-order: the fused kernels quantise exactly what a gather after the plain ones would."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from schedules import geglu, quantize, rms_norm, swiglu
from schedules.geometry import Geometry
from schedules.kernel import TensorSpec
from tests.schedules.kernels import ARM, AVX2, NATIVE, RUNNABLE, assert_no_heap, build, request
from tests.schedules.test_quantize import outputs, reference

SHAPES = [(1, 256, 128), (3, 172, 43), (2, 37, 37)]
PRODUCERS = {"rms_norm": rms_norm.lower, "swiglu": swiglu.lower, "geglu": geglu.lower}


def order(k: int) -> np.ndarray:
    return np.random.default_rng(k).permutation(k).astype(np.int32)


def inputs(name: str, m: int, k: int) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Arguments and attributes of a producer of rows of k."""
    rng = np.random.default_rng(5)
    if name == "rms_norm":
        return [rng.standard_normal((m, k), np.float32), rng.random(k, np.float32)], {"eps": 1e-5}
    return [rng.standard_normal((m, 2 * k), np.float32)], {}


def test_gather_by_hand():
    x, places = np.array([[5, 6, 7]], np.float32), np.array([2, 0, 1], np.int32)
    kernel = build(quantize.lower, request("quern.gather", [x, places], [TensorSpec((1, 3), "float32")], NATIVE))
    assert kernel(x, places)[0].tolist() == [[7, 5, 6]]


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize(("m", "k", "group"), SHAPES)
def test_quantize_permuted(m, k, group, target):
    x, places = np.random.default_rng(1).standard_normal((m, k), np.float32), order(k)
    call = request("quern.quantize_permuted", [x, places], outputs(m, Geometry(k, group)), target, group=group)
    made, wanted = build(quantize.lower, call)(x, places), reference(x[:, places], Geometry(k, group))
    for got, want in zip(made, wanted, strict=True):
        assert np.array_equal(got, want)


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize(("m", "k", "group"), SHAPES)
@pytest.mark.parametrize("name", PRODUCERS)
def test_producers_quantise_the_permuted_row(name, m, k, group, target):
    args, attrs = inputs(name, m, k)
    lower, places = PRODUCERS[name], order(k)
    (row,) = build(lower, request(f"quern.{name}", args, [TensorSpec((m, k), "float32")], target, **attrs))(*args)
    call = request(
        f"quern.{name}_quantize_permuted", [*args, places], outputs(m, Geometry(k, group)), target, **attrs, group=group
    )
    for got, want in zip(build(lower, call)(*args, places), reference(row[:, places], Geometry(k, group)), strict=True):
        assert np.array_equal(got, want)


@pytest.mark.parametrize("target", [NATIVE, AVX2, ARM], ids=lambda t: t.name)
def test_gathering_takes_no_heap(target):
    args, attrs = inputs("rms_norm", 1, 2048)
    outs = outputs(1, Geometry(2048, 128))
    call = request("quern.rms_norm_quantize_permuted", [*args, order(2048)], outs, target, **attrs, group=128)
    assert_no_heap(build(rms_norm.lower, call).assembly)
