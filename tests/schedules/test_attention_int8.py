from __future__ import annotations

import numpy as np
import pytest

from schedules import attention_int8
from schedules.kernel import TensorSpec
from schedules.vector import TANH2_ERROR
from tests.schedules.kernels import ARM, AVX2, NATIVE, RUNNABLE, build, request
from tests.schedules.test_attention import oracle, tolerance

CAPACITY = 304


def pack(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes i8[kv_heads, capacity, d] as the cache has them."""
    kv_heads, capacity, d = keys.shape
    k = keys.reshape(kv_heads, capacity // 16, 16, d // 2, 2).transpose(0, 1, 3, 2, 4)
    padded = np.zeros((kv_heads, capacity, -(-d // 16) * 16), np.int8)
    padded[:, :, :d] = values
    v = padded.reshape(kv_heads, capacity // 2, 2, -1).transpose(0, 1, 3, 2)
    return k.reshape(kv_heads, capacity // 16, d // 2, 32).copy(), v.reshape(kv_heads, capacity // 2, -1).copy()


def compiled(m: int, heads: int, kv_heads: int, d: int, target, capacity: int = CAPACITY, knobs=None, **own: float):
    keys, values = pack(*np.zeros((2, kv_heads, capacity, d), np.int8))
    scale = np.zeros((kv_heads, capacity), np.float32)
    args = [np.zeros((m, heads * d), np.float32), keys, values, scale, scale, np.zeros(2, np.int32)]
    outs = [TensorSpec((m, heads * d), "float32")]
    attrs = {"heads": heads, "kv_heads": kv_heads, "head_dim": d, **own}
    return build(attention_int8.lower, request("quern.attention_int8", args, outs, target, knobs, **attrs))


def rounding(q: np.ndarray, keys: np.ndarray, values: np.ndarray, d: int, length: int, scale: float) -> float:
    """What the two integer roundings may add, absolutely.

    A query's element is off by half a level of its largest, a score by d such times the largest key; that counts twice
    (numerator, sum). A weight is off by half of 1/32767 of the row's largest weight, which the sum contains.
    """
    levels = min(32767, (2**31 - 1) // (127 * d))
    score = d * np.abs(q).max() * np.abs(keys).max() * scale / (2 * levels)
    return float((2 * min(score, 1.0) + length / (2 * 32767)) * np.abs(values).max())


def check(kernel, q, codes, scales, start: int, valid: int, scale=None, softcap: float = 0, window: int = 0) -> None:
    """Positions that nobody may see hold the largest codes under huge scales, so that a leak shows."""
    m, heads, d = q.shape
    end, scale = start + valid, d**-0.5 if scale is None else scale
    (keys, values), (k_scale, v_scale) = (x.copy() for x in codes), (x.copy() for x in scales)
    real_keys = keys[:, :end] * k_scale[:, :end, None].astype(np.float64)
    real_values = values[:, :end] * v_scale[:, :end, None].astype(np.float64)
    want = oracle(q[:valid], real_keys, real_values, start, scale, softcap, window)
    limit = tolerance(q * np.float32(scale * d**0.5), real_keys, real_values, d, end)
    limit += rounding(q, real_keys, real_values, d, end, scale)
    limit += 2 * TANH2_ERROR * softcap * np.abs(real_values).max()
    keys[:, end:], values[:, end:], k_scale[:, end:], v_scale[:, end:] = 127, -128, 1e30, 1e30
    span = np.array([start, valid], np.int32)
    (got,) = kernel(q.reshape(m, heads * d), *pack(keys, values), k_scale, v_scale, span)
    np.testing.assert_allclose(got.reshape(m, heads, d)[:valid], want, rtol=0, atol=limit)


def random(rng, kv_heads: int, d: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    codes = tuple(rng.integers(-127, 128, (kv_heads, CAPACITY, d)).astype(np.int8) for _ in range(2))
    return codes, tuple(rng.uniform(0.5, 3, (kv_heads, CAPACITY)).astype(np.float32) / 127 for _ in range(2))


def test_two_positions_by_hand():  # key 2 * (63 / 126) * ln 3 against q (1, 0): weights 1/4 and 3/4
    codes, scales = np.zeros((2, 1, 16, 2), np.int8), np.ones((2, 1, 16), np.float32)
    codes[0, 0, 1, 0], scales[0, 0, 1] = 63, np.log(3) / 63
    codes[1, 0, :2, 0], codes[1, 0, :2, 1] = [4, 8], [-4, 4]
    args = np.array([[1, 0]], np.float32), *pack(*codes), *scales, np.array([1, 1], np.int32)
    (got,) = compiled(1, 1, 1, 2, NATIVE, capacity=16, scale=1.0)(*args)
    np.testing.assert_allclose(got, [[7, 2]], atol=8 * 1e-4)


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("m", "heads", "kv_heads", "d"),
    [(1, 8, 1, 64), (1, 14, 2, 64), (1, 3, 3, 128), (1, 12, 4, 80), (1, 5, 1, 8), (1, 4, 2, 256), (5, 6, 2, 20),
     (16, 2, 2, 32), (6, 4, 2, 64), (3, 7, 1, 12)],
)  # fmt: skip
def test_against_float64(m, heads, kv_heads, d, target):
    rng, kernel = np.random.default_rng(d), compiled(m, heads, kv_heads, d, target)
    q = rng.standard_normal((m, heads, d)).astype(np.float32)
    codes, scales = random(rng, kv_heads, d)
    for start, valid in [(0, 1), (0, m), (15, m), (16, max(1, m - 2)), (127, m), (150, 1), (CAPACITY - m, m)]:
        check(kernel, q, codes, scales, start, valid)


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize(("m", "heads", "kv_heads", "d"), [(1, 6, 2, 80), (8, 4, 2, 64)])
@pytest.mark.parametrize(
    "own", [{"window": 1}, {"window": 130}, {"softcap": 30.0, "window": 40, "scale": 0.1}], ids=str
)
def test_windows_caps_and_scales(m, heads, kv_heads, d, own, target):
    rng, kernel = np.random.default_rng(d), compiled(m, heads, kv_heads, d, target, **own)
    q = rng.standard_normal((m, heads, d)).astype(np.float32)
    codes, scales = random(rng, kv_heads, d)
    for start, valid in [(0, m), (127, m), (150, max(1, m - 2)), (CAPACITY - m, m)]:
        before = max(0, start - own["window"] + 1)
        hidden = tuple(s.copy() for s in scales)
        hidden[0][:, :before] = 1e4  # finite, as every past scale is, but such keys would take all weight
        check(kernel, q, codes, hidden, start, valid, **own)


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize(("d", "block"), [(64, 512), (256, 128)])
def test_no_sum_overflows(d, block, target):
    """All codes at the ends, all query elements equal, all weights equal: every accumulator at its bound."""
    capacity, heads = 1024, 2
    kernel = compiled(1, heads, 1, d, target, capacity, {"block": block, "parts": 1})
    for key, value in ((127, 127), (-127, 127), (127, -127)):
        codes, scale = np.full((2, 1, capacity, d), key, np.int8), np.full((1, capacity), 1 / 127, np.float32)
        codes[1] = value
        span = np.array([capacity - 1, 1], np.int32)
        args = np.full((1, heads * d), 3.5, np.float32), *pack(*codes), scale, scale, span
        # the sum of 1024 equal weights and of their products rounds by 2^-24 each time
        np.testing.assert_allclose(kernel(*args)[0], np.sign(value), rtol=1024 * 2.0**-24)


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
def test_extreme_scales_and_queries(target):
    rng, kernel = np.random.default_rng(0), compiled(1, 2, 1, 64, target)
    q = rng.standard_normal((1, 2, 64)).astype(np.float32)
    codes, scales = random(rng, 1, 64)
    for factor in (0, 1e-40, 1e-30, 1, 30):
        check(kernel, q * np.float32(factor), codes, scales, 303, 1)
    for k_factor, v_factor in ((0, 1), (1, 0), (1e-38, 1e4), (1, 1e30)):
        check(kernel, q, codes, (scales[0] * np.float32(k_factor), scales[1] * np.float32(v_factor)), 200, 1)
    rising = codes[0].copy(), codes[1]
    rising[0][0, :, 0] = np.linspace(-127, 127, CAPACITY)  # each block's maximum replaces the last one
    check(kernel, q * np.float32(8), rising, scales, 303, 1)
    one = scales[0].copy()
    one[0, 77] = 1e4  # one position takes all weight: it comes back to the rounding of its weight
    first = codes[0].copy()
    first[0, 77] = np.sign(q[0, 0]) * 127
    span = np.array([303, 1], np.int32)
    (got,) = kernel(np.repeat(q[:, :1], 2, 1).reshape(1, 128), *pack(first, codes[1]), one, scales[1], span)
    want = codes[1][0, 77] * scales[1][0, 77]
    np.testing.assert_allclose(got[0, :64], want, rtol=4 * 2.0**-24, atol=1e-6)


@pytest.mark.parametrize("target", [NATIVE, AVX2, ARM], ids=lambda t: t.name)
def test_vector_code(target):
    """The instruction that sums two products a lane is there: VPDPWSSD where the CPU has it, VPMADDWD, else SMULL."""
    assembly = compiled(1, 32, 4, 64, target, capacity=2048).assembly
    pairs = "smull" if target.arch == "aarch64" else "vpdpwssd" if target.has("avx512vnni") else "vpmaddwd"
    assert assembly.count(pairs) >= 32
    assert not any(name in assembly for name in ("exp2f", "roundevenf"))
