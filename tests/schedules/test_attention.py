from __future__ import annotations

import numpy as np
import pytest

from schedules import attention
from schedules.kernel import TensorSpec, lowerings
from schedules.vector import EXP2_ERROR, TANH2_ERROR
from tests.schedules import emulated
from tests.schedules.kernels import ARM, AVX2, EPS32, NATIVE, RUNNABLE, build, request, widest_register
from tests.schedules.test_rope import block_keys


def tolerance(q: np.ndarray, keys: np.ndarray, values: np.ndarray, d: int, length: int) -> float:
    """Absolute. A score errs by (d + 4) roundings of |q|.|k| / sqrt(d); a weight, relatively, by that and 2^x's error.

    The error of a weight counts twice (numerator, sum); sums over `length` weights of one sign round `length` times.
    """
    largest = np.abs(q).max() * np.abs(keys.astype(np.float64)).max() * np.sqrt(d)
    weight = (d + 4) * EPS32 * largest + EXP2_ERROR
    return 2 * (weight + (length + 4) * EPS32) * np.abs(values.astype(np.float64)).max()


def oracle(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, start: int, scale: float, softcap: float, window: int
) -> np.ndarray:
    """q [m, heads, d], caches [kv_heads, capacity, d], in float64."""
    m, heads, d = q.shape
    repeat = heads // keys.shape[0]
    keys, values = (np.repeat(x.astype(np.float64), repeat, 0) for x in (keys, values))
    out = np.empty((m, heads, d))
    for t in range(m):
        seen = slice(max(0, start + t + 1 - window) if window else 0, start + t + 1)
        score = np.einsum("hd,hpd->hp", q[t].astype(np.float64), keys[:, seen]) * scale
        score = softcap * np.tanh(score / softcap) if softcap else score
        weight = np.exp(score - score.max(-1, keepdims=True))
        out[t] = np.einsum("hp,hpd->hd", weight / weight.sum(-1, keepdims=True), values[:, seen])
    return out


def compiled(m: int, heads: int, kv_heads: int, d: int, dtype: str, target, capacity: int = 304, **own: float):
    args = [
        np.zeros((m, heads * d), np.float32),
        np.zeros((kv_heads, capacity // 16, d, 16), dtype),
        np.zeros((kv_heads, capacity, d), dtype),
        np.zeros(2, np.int32),
    ]
    outs = [TensorSpec((m, heads * d), "float32")]
    call = request("quern.attention", args, outs, target, {}, heads=heads, kv_heads=kv_heads, head_dim=d, **own)
    return build(attention.lower, call)


def check(kernel, q, keys, values, start: int, valid: int, scale=None, softcap: float = 0, window: int = 0) -> None:
    """Positions that nobody may see hold NaN in v and huge keys, so that a leak shows."""
    m, heads, d = q.shape
    end = start + valid
    keys, values = keys.copy(), values.copy()
    scale = d**-0.5 if scale is None else scale
    want = oracle(q[:valid], keys, values, start, scale, softcap, window)
    limit = tolerance(q * np.float32(scale * d**0.5), keys[:, :end], values[:, :end], d, end)
    # A capped score errs by that much of the cap, a weight as much, and it counts twice: numerator and sum.
    limit += 2 * TANH2_ERROR * softcap * np.abs(values[:, :end].astype(np.float64)).max()
    keys[:, end:], values[:, end:] = 6e4, np.nan
    (got,) = kernel(q.reshape(m, heads * d), block_keys(keys), values, np.array([start, valid], np.int32))
    np.testing.assert_allclose(got.reshape(m, heads, d)[:valid], want, rtol=0, atol=limit)


def test_two_positions_by_hand():  # scores 0 and ln 3 * sqrt(1) / 1: weights 1/4 and 3/4
    keys, values = np.zeros((1, 16, 1), np.float32), np.zeros((1, 16, 1), np.float32)
    keys[0, 1], values[0, :2, 0] = np.log(3), [4, 8]
    args = np.ones((1, 1), np.float32), block_keys(keys), values, np.array([1, 1], np.int32)
    assert compiled(1, 1, 1, 1, "float32", NATIVE, capacity=16)(*args)[0].tolist() == [[pytest.approx(7, abs=1e-6)]]


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("m", "heads", "kv_heads", "d"),
    [
        (1, 8, 1, 64), (1, 14, 2, 64), (1, 3, 3, 128), (1, 6, 2, 80), (1, 5, 1, 8), (1, 4, 2, 256), (1, 2, 1, 96),
        (16, 2, 2, 32), (5, 6, 2, 16), (6, 4, 2, 64), (3, 7, 1, 12),
    ],
)  # fmt: skip
def test_against_float64(m, heads, kv_heads, d, dtype, target):
    rng, kernel = np.random.default_rng(d), compiled(m, heads, kv_heads, d, dtype, target)
    q = rng.standard_normal((m, heads, d)).astype(np.float32)
    keys, values = (rng.standard_normal((kv_heads, 304, d)).astype(dtype) for _ in range(2))
    spans = [(0, 1), (0, m), (15, m), (16, max(1, m - 2)), (127, m), (150, 1), (304 - m, m)]
    for start, valid in spans:
        check(kernel, q, keys, values, start, valid)


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
@pytest.mark.parametrize(("m", "heads", "kv_heads", "d"), [(1, 6, 2, 80), (8, 4, 2, 256), (6, 4, 2, 12)])
@pytest.mark.parametrize(
    "own",
    [{"window": 1}, {"window": 17}, {"window": 130}, {"softcap": 0.5, "scale": 0.7}, {"softcap": 30.0, "window": 40}],
    ids=str,
)
def test_windows_caps_and_scales(m, heads, kv_heads, d, own, target):
    rng, kernel = np.random.default_rng(d), compiled(m, heads, kv_heads, d, "float16", target, **own)
    q = rng.standard_normal((m, heads, d)).astype(np.float32)
    keys, values = (rng.standard_normal((kv_heads, 304, d)).astype(np.float16) for _ in range(2))
    for start, valid in [(0, m), (15, m), (127, m), (150, max(1, m - 2)), (304 - m, m)]:
        before = max(0, start - own["window"] + 1) if "window" in own else 0
        keys[:, :before] = 6e4  # finite, as every past key and value is, but it would take all weight
        check(kernel, q, keys, values, start, valid, **own)
        keys[:, :before] = rng.standard_normal((kv_heads, before, d))


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
def test_extreme_scores(target):
    rng, kernel = np.random.default_rng(0), compiled(1, 2, 1, 64, "float16", target)
    q, keys, values = (rng.standard_normal(s).astype(np.float32) for s in ((1, 2, 64), (1, 304, 64), (1, 304, 64)))
    keys, values = keys.astype(np.float16), values.astype(np.float16)
    rising = keys.copy()
    rising[0, :, 0] = np.arange(304) / 8  # each block's maximum replaces the last one
    for scale in (0, 1e-40, 1, 30):
        check(kernel, (q * np.float32(scale)), keys, values, 303, 1)
        check(kernel, (q * np.float32(scale)), rising, values, 303, 1)
    check(kernel, q, np.zeros_like(keys), values * np.float16(1e4), 200, 1)
    one_hot = keys.copy()
    one_hot[0, 77] = np.sign(q[0, 0]) * np.float16(6e4)  # one position takes all weight: 2^0 is exactly 1, the rest 0
    (got,) = kernel(np.repeat(q[:, :1] * np.float32(1e4), 2, 1).reshape(1, 128), block_keys(one_hot), values,
                    np.array([303, 1], np.int32))  # fmt: skip
    assert np.array_equal(got[0, :64], values[0, 77].astype(np.float32))


@pytest.mark.parametrize(
    ("m", "heads", "kv_heads", "d", "own"),
    [(16, 16, 4, 64, {}), (16, 7, 1, 12, {}), (8, 8, 2, 80, {"window": 17}), (4, 8, 1, 128, {"softcap": 30.0}),
     (1, 8, 1, 64, {})],
    ids=str,
)  # fmt: skip
def test_prompts_on_arm64(m, heads, kv_heads, d, own) -> None:
    """Keys and values that are widened once a task: to the bit what is widened anew for every group of rows."""
    rng, scale = np.random.default_rng(d), d**-0.5
    q = rng.standard_normal((m, heads, d)).astype(np.float32)
    keys, values = (rng.standard_normal((kv_heads, 304, d)).astype(np.float16) for _ in range(2))
    start, valid = 130, max(1, m - 1)
    end, before = start + valid, max(0, start - own["window"] + 1) if "window" in own else 0
    want = oracle(q[:valid], keys, values, start, scale, own.get("softcap", 0), own.get("window", 0))
    limit = tolerance(q, keys[:, :end], values[:, :end], d, end)
    limit += 2 * TANH2_ERROR * own.get("softcap", 0) * np.abs(values[:, :end].astype(np.float64)).max()
    keys[:, :before], keys[:, end:], values[:, end:] = 6e4, 6e4, np.nan
    args = [q.reshape(m, heads * d), block_keys(keys), values, np.array([start, valid], np.int32)]
    outs = [TensorSpec((m, heads * d), "float32")]
    call = request("quern.attention", args, outs, ARM, {}, heads=heads, kv_heads=kv_heads, head_dim=d, **own)
    kernel = lowerings()["quern.attention"](call)
    assert kernel.name.startswith("attention_widened_")
    (got,), (plain,) = (emulated.run(k, call, args) for k in (kernel, attention.lower(call)))
    np.testing.assert_allclose(got.reshape(m, heads, d)[:valid], want, rtol=0, atol=limit)
    assert np.array_equal(got.reshape(m, heads, d)[:valid], plain.reshape(m, heads, d)[:valid])


def test_who_takes_attention() -> None:
    """Widening once a task serves several groups of rows; one token of 4 heads a kv head is one group."""
    for m, dtype, target, family in ((16, "float16", ARM, "_widened"), (1, "float16", ARM, ""),
                                     (16, "float32", ARM, ""), (16, "float16", AVX2, "")):  # fmt: skip
        args = [np.zeros((m, 512), np.float32), np.zeros((2, 4, 64, 16), dtype), np.zeros((2, 64, 64), dtype),
                np.zeros(2, np.int32)]  # fmt: skip
        call = request("quern.attention", args, [TensorSpec((m, 512), "float32")], target, heads=8, kv_heads=2,
                       head_dim=64)  # fmt: skip
        assert lowerings()["quern.attention"](call).name.startswith(f"attention{family}_{dtype}_")


@pytest.mark.parametrize("target", [NATIVE, AVX2, ARM], ids=lambda t: t.name)
def test_vector_code(target):
    assembly = compiled(1, 32, 4, 64, "float16", target, capacity=2048).assembly
    assert widest_register(assembly) == {512: "zmm", 256: "ymm", 128: "v0"}[target.vector_bits]
    assert not any(name in assembly for name in ("exp2f", "roundevenf", "__extendhfsf2@", "__gnu_h2f"))
