from __future__ import annotations

import numpy as np
import pytest

from schedules import rope
from schedules.kernel import TensorSpec
from tests.schedules.kernels import ARM, AVX2, EPS32, NATIVE, RUNNABLE, assert_no_heap, build, request

CONTEXT = 64
# Two products and a sum of numbers below 2 * max|x|, each rounded once.
TOLERANCE = 4 * EPS32
HALF_EPS = {"float16": 2.0**-11, "float32": 0.0}  # relative error of storing
DENORMAL_STEP = {"float16": 2.0**-25, "float32": 0.0}


def angles(d: int) -> np.ndarray:
    angle = np.arange(CONTEXT)[:, None] / 10000 ** (np.arange(d // 2) * 2 / d)
    return np.concatenate([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


def block_keys(keys: np.ndarray) -> np.ndarray:
    """[kv_heads, capacity, d] -> [kv_heads, capacity/16, d, 16]."""
    kv_heads, capacity, d = keys.shape
    return np.ascontiguousarray(keys.reshape(kv_heads, capacity // 16, 16, d).transpose(0, 1, 3, 2))


def oracle(x: np.ndarray, table: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x [m, heads, d], rotated in float64."""
    x, half = x.astype(np.float64), x.shape[-1] // 2
    cos, sin = (table[positions][:, None, part].astype(np.float64) for part in (slice(half), slice(half, None)))
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def compiled(m: int, heads: int, kv_heads: int, d: int, dtype: str, target, capacity: int = 48):
    args = [
        np.zeros((m, (heads + 2 * kv_heads) * d), np.float32),
        np.zeros((CONTEXT, d), np.float32),
        np.zeros(2, np.int32),
        np.zeros((kv_heads, capacity // 16, d, 16), dtype),
        np.zeros((kv_heads, capacity, d), dtype),
    ]
    outs = [TensorSpec((m, heads * d), "float32")]
    call = request("quern.rope_append", args, outs, target, heads=heads, kv_heads=kv_heads, head_dim=d)
    return build(rope.lower, call, inplace=(3, 4))


def test_quarter_turn_by_hand():  # cos 0, sin 1: (a, b) -> (-b, a)
    table = np.zeros((CONTEXT, 2), np.float32)
    table[17] = [0, 1]
    keys, values = np.zeros((1, 3, 2, 16), np.float16), np.zeros((1, 48, 2), np.float16)
    qkv, span = np.array([[1, 2, 3, 4, 5, 6]], np.float32), np.array([17, 1], np.int32)
    (q,) = compiled(1, 1, 1, 2, "float16", NATIVE)(qkv, table, span, keys, values)
    assert q.tolist() == [[-2, 1]]
    assert keys[0, 1, :, 1].tolist() == [-4, 3]
    assert values[0, 17].tolist() == [5, 6]


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("m", "heads", "kv_heads", "d", "start", "valid"),
    [(1, 4, 4, 8, 0, 1), (1, 7, 1, 64, 31, 1), (5, 3, 1, 80, 14, 5), (5, 6, 2, 12, 30, 3), (3, 4, 2, 256, 45, 3)],
)
def test_against_float64_and_leaves_the_rest_alone(m, heads, kv_heads, d, start, valid, dtype, target):
    rng, table = np.random.default_rng(d), angles(d)
    qkv = rng.standard_normal((m, (heads + 2 * kv_heads) * d)).astype(np.float32)
    before_k, before_v = (rng.standard_normal((kv_heads, 48, d)).astype(dtype) for _ in range(2))
    keys, values = block_keys(before_k), before_v.copy()
    span = np.array([start, valid], np.int32)
    (q,) = compiled(m, heads, kv_heads, d, dtype, target)(qkv, table, span, keys, values)

    rows = qkv.reshape(m, heads + 2 * kv_heads, d)[:valid]
    positions = start + np.arange(valid)
    limit = TOLERANCE * 2 * np.abs(qkv).max()
    want_q = oracle(rows[:, :heads], table, positions)
    np.testing.assert_allclose(q[:valid].reshape(want_q.shape), want_q, rtol=0, atol=limit)

    want_k = before_k.astype(np.float64)
    want_k[:, positions] = oracle(rows[:, heads : heads + kv_heads], table, positions).transpose(1, 0, 2)
    got_k = keys.transpose(0, 1, 3, 2).reshape(kv_heads, 48, d)
    np.testing.assert_allclose(
        got_k[:, positions].astype(np.float64), want_k[:, positions], rtol=HALF_EPS[dtype],
        atol=limit * 2 + DENORMAL_STEP[dtype],
    )  # fmt: skip
    want_v = before_v.copy()
    want_v[:, positions] = rows[:, heads + kv_heads :].transpose(1, 0, 2).astype(dtype)
    assert np.array_equal(values, want_v)
    others = np.setdiff1d(np.arange(48), positions)
    assert np.array_equal(got_k[:, others], before_k[:, others])


def unpack(keys: np.ndarray, values: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of an int8 cache as [kv_heads, capacity, d]."""
    kv_heads, blocks = keys.shape[:2]
    k = keys.reshape(kv_heads, blocks, d // 2, 16, 2).transpose(0, 1, 3, 2, 4).reshape(kv_heads, blocks * 16, d)
    v = values.reshape(kv_heads, blocks * 8, -1, 2).transpose(0, 1, 3, 2).reshape(kv_heads, blocks * 16, -1)
    return k, v


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize("size", [0, 1e-38, 1e-30, 1, 1e30], ids="{:g}".format)
@pytest.mark.parametrize(
    ("m", "heads", "kv_heads", "d", "start", "valid"),
    [(1, 7, 1, 64, 31, 1), (5, 3, 1, 80, 14, 5), (5, 6, 2, 12, 30, 3), (3, 4, 2, 256, 45, 3)],
)
def test_int8_cache_takes_the_nearest_code(m, heads, kv_heads, d, start, valid, size, target):
    rng, table = np.random.default_rng(d), angles(d)
    qkv = (rng.standard_normal((m, (heads + 2 * kv_heads) * d)) * size).astype(np.float32)
    qkv[:, heads * d] = size  # no head is all zeros but where size is 0
    padded = 2 * -(-d // 16) * 16
    shapes = (kv_heads, 3, d // 2, 32), (kv_heads, 24, padded)
    before = [rng.integers(-127, 128, shape).astype(np.int8) for shape in shapes]
    before += [rng.standard_normal((kv_heads, 48)).astype(np.float32) for _ in range(2)]
    caches = [array.copy() for array in before]
    call = request(
        "quern.rope_append_int8", [qkv, table, np.zeros(2, np.int32), *caches],
        [TensorSpec((m, heads * d), "float32")], target, heads=heads, kv_heads=kv_heads, head_dim=d,
    )  # fmt: skip
    build(rope.lower, call, inplace=(3, 4, 5, 6))(qkv, table, np.array([start, valid], np.int32), *caches)

    rows = qkv.reshape(m, heads + 2 * kv_heads, d)[:valid].astype(np.float64)
    positions = start + np.arange(valid)
    others = np.setdiff1d(np.arange(48), positions)
    rotated = oracle(rows[:, heads : heads + kv_heads], table, positions)
    old, new = unpack(before[0], before[1], d), unpack(caches[0], caches[1], d)
    for i, (want, was, got) in enumerate(zip((rotated, rows[:, heads + kv_heads :]), old, new, strict=True)):
        want, largest = want.transpose(1, 0, 2), np.abs(want).max(2).T
        codes, scale = got[:, positions, :d].astype(np.float64), caches[2 + i][:, positions].astype(np.float64)
        if size < 1e-36:
            assert not codes.any() and not scale.any()
        else:
            assert (np.abs(codes).max(2) == 127).all()
            np.testing.assert_allclose(scale, largest / 127, rtol=1e-5)
            # half a code, and what fp32 rotation may move it by
            assert (np.abs(codes * scale[..., None] - want) <= 0.5001 * scale[..., None] + 8 * EPS32 * size * 8).all()
        assert np.array_equal(got[:, others], was[:, others])
        assert np.array_equal(caches[2 + i][:, others], before[2 + i][:, others])


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize("each", [True, False], ids=["each head", "all heads"])
def test_norms_come_before_the_rotation(each, target):
    m, heads, kv_heads, d, eps, rng, table = 3, 6, 2, 20, 1e-5, np.random.default_rng(3), angles(20)
    qkv = rng.standard_normal((m, (heads + 2 * kv_heads) * d)).astype(np.float32)
    span, caches = np.array([14, m], np.int32), [np.zeros((2, 3, d, 16), np.float32), np.zeros((2, 48, d), np.float32)]
    weights = [rng.standard_normal(d if each else count * d).astype(np.float32) for count in (heads, kv_heads)]
    args = [qkv, table, span, *weights, *caches]
    call = request(
        "quern.rope_append_norm", args, [TensorSpec((m, heads * d), "float32")], target,
        heads=heads, kv_heads=kv_heads, head_dim=d, eps=eps,
    )  # fmt: skip
    (q,) = build(rope.lower, call, inplace=(5, 6))(*args)
    rows, got_k = qkv.astype(np.float64).reshape(m, -1, d), caches[0].transpose(0, 1, 3, 2).reshape(2, 48, d)
    for part, weight, got in (
        (rows[:, :heads], weights[0], q.reshape(m, heads, d)),
        (rows[:, heads : heads + kv_heads], weights[1], got_k[:, 14 : 14 + m].transpose(1, 0, 2)),
    ):
        mean = (part**2).mean(axis=2 if each else (1, 2), keepdims=True)
        normed = part / np.sqrt(mean + eps) * (weight if each else weight.reshape(-1, d))
        # a norm: some 10 roundings in its factor, 2 more for each value
        limit = (TOLERANCE + 12 * EPS32) * 2 * np.abs(normed).max()
        np.testing.assert_allclose(got, oracle(normed, table, 14 + np.arange(m)), rtol=0, atol=limit)
    assert np.array_equal(caches[1][:, 14 : 14 + m].transpose(1, 0, 2), qkv.reshape(m, -1, d)[:, heads + kv_heads :])


@pytest.mark.parametrize("target", [NATIVE, AVX2, ARM], ids=lambda t: t.name)
def test_no_heap(target):
    assert_no_heap(compiled(1, 32, 4, 64, "float16", target).assembly)
