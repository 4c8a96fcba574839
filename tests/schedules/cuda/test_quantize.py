"""Quantisation on CUDA: to the bit where it stands alone, within the producers' errors behind a norm or a gate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import targets
from schedules.cuda import quantize
from schedules.cuda.kernel import CudaKernel
from schedules.geometry import Geometry
from schedules.quantize import SMALLEST
from tests.emulator import cuda
from tests.schedules import test_geglu, test_rms_norm, test_swiglu
from tests.schedules.kernels import EPS32, request
from tests.schedules.test_quantize import SHAPES, outputs, reference, samples

ORIN = targets.load("jetson-orin")
EPS = test_rms_norm.EPS
Results = list[np.ndarray]


def lowered(op: str, args: list[np.ndarray], geometry: Geometry, warps: int = 8, **attrs: Any) -> CudaKernel:
    outs = outputs(args[0].shape[0], geometry)
    return quantize.lower(request(op, args, outs, ORIN, {"warps": warps}, group=geometry.group, **attrs))


def run(kernel: CudaKernel, args: list[np.ndarray], geometry: Geometry) -> Results:
    outs = [np.full(spec.shape, 99, spec.dtype) for spec in outputs(args[0].shape[0], geometry)]
    cuda.run(kernel, [*args, *outs])
    return outs


def order(k: int) -> np.ndarray:
    return np.random.default_rng(k).permutation(k).astype(np.int32)


@pytest.mark.parametrize(("k", "group"), SHAPES[::2])
def test_equals_the_float32_definition(k: int, group: int) -> None:
    geometry, places = Geometry(k, group), order(k)
    plain = lowered("quern.quantize", [np.zeros((3, k), np.float32)], geometry)
    permuted = lowered("quern.quantize_permuted", [np.zeros((3, k), np.float32), places], geometry)
    for name, x in samples(3, k).items():
        for got, want in zip(run(plain, [x], geometry), reference(x, geometry), strict=True):
            assert np.array_equal(got, want), name
        for got, want in zip(run(permuted, [x, places], geometry), reference(x[:, places], geometry), strict=True):
            assert np.array_equal(got, want), name


def assert_quantises(made: Results, want: np.ndarray, error: np.ndarray, geometry: Geometry, name: str) -> None:
    """Every code within half a step of `want`, give or take `error` and 3 roundings; steps fit the largest value."""
    q, scale, total = made
    place = geometry.source
    spread, allowed = (np.where(place >= 0, a[:, np.maximum(place, 0)], 0) for a in (want, error))
    assert np.array_equal(total, q.sum(-1)), name
    assert (q[:, place < 0] == 0).all(), name
    most = np.abs(spread).max(-1)
    some = most > 2 * SMALLEST
    assert (np.abs(scale * 127.0 - most) <= allowed.max(-1) + 3 * EPS32 * most)[some].all(), name
    off = np.abs(q * scale[..., None].astype(np.float64) - spread)
    assert (off <= scale[..., None] * (0.5 + 127 * 3 * EPS32) + allowed)[some].all(), name
    assert (np.abs(q).max(-1) == 127)[some].all(), name


@pytest.mark.parametrize(("m", "d", "group", "warps"), [(1, 2048, 128, 16), (2, 172, 43, 1), (1, 1030, 103, 8)])
@pytest.mark.parametrize("permuted", [False, True])
def test_behind_a_norm(m: int, d: int, group: int, warps: int, permuted: bool) -> None:
    geometry, weight = Geometry(d, group), np.random.default_rng(2).standard_normal(d).astype(np.float32)
    places = order(d)
    op = f"quern.rms_norm_quantize{'_permuted' if permuted else ''}"
    more = [places] if permuted else []
    kernel = lowered(op, [np.zeros((m, d), np.float32), weight, *more], geometry, warps, eps=EPS)
    for name, x in test_rms_norm.samples(m, d).items():
        want = test_rms_norm.oracle(x, weight)
        error = np.abs(want) * test_rms_norm.tolerance(d) + 1e-37
        want, error = (want[:, places], error[:, places]) if permuted else (want, error)
        assert_quantises(run(kernel, [x, weight, *more], geometry), want, error, geometry, name)


@pytest.mark.parametrize(("m", "f", "group", "warps"), [(1, 256, 128, 8), (2, 172, 43, 2)])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("gate", [test_swiglu, test_geglu], ids=["swiglu", "geglu"])
def test_behind_a_gate(gate: Any, permuted: bool, m: int, f: int, group: int, warps: int) -> None:
    geometry, places = Geometry(f, group), order(f)
    more = [places] if permuted else []
    op = f"quern.{gate.__name__.rpartition('_')[2]}_quantize{'_permuted' if permuted else ''}"
    kernel = lowered(op, [np.zeros((m, 2 * f), np.float32), *more], geometry, warps)
    for name, x in gate.samples(m, f).items():
        want, error = gate.oracle(x), gate.tolerance(x)
        want, error = (want[:, places], error[:, places]) if permuted else (want, error)
        assert_quantises(run(kernel, [x, *more], geometry), want, error, geometry, name)
