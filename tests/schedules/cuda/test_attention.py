"""Attention on every kind of chip: emulated against float64 within a derived bound, and by registers and PTX."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from schedules.cuda import attention_decode
from schedules.cuda.kernel import lowerings
from schedules.kernel import Request, TensorSpec
from schedules.vector import TANH2_ERROR
from targets import Target
from tests.emulator.cuda import EmulationError, hardware
from tests.schedules import test_attention_int8
from tests.schedules.cuda.kernels import ALL, NANO, ORIN, SM90, XAVIER, Emulated, check_resources
from tests.schedules.kernels import spec
from tests.schedules.test_attention import oracle, tolerance
from tests.schedules.test_rope import block_keys

CAPACITY = 304
EPS16, SMALLEST16 = 2.0**-11, 2.0**-25  # largest relative error of an fp16 operation; absolute, near zero
HALF = ("mma", "wmma")  # families that round queries and weights to fp16
DECODE = [
    ("float16", 14, 2, 80), ("float16", 4, 2, 256), ("float16", 6, 2, 12), ("float32", 3, 3, 10),
    ("int8", 8, 1, 64), ("int8", 12, 4, 20),
]  # fmt: skip
PROMPT = [  # family, target, cache, m, query heads, kv heads, d
    ("tile", NANO, "float16", 40, 14, 2, 80), ("tile", NANO, "float32", 3, 7, 1, 12),
    ("tile", NANO, "int8", 8, 4, 2, 256),
    ("wmma", XAVIER, "float16", 40, 14, 2, 80), ("wmma", XAVIER, "int8", 6, 6, 2, 20),
    ("mma", ORIN, "float16", 40, 14, 2, 80), ("mma", ORIN, "int8", 8, 4, 2, 256), ("mma", ORIN, "int8", 6, 6, 2, 20),
]  # fmt: skip
SLOW = [
    ("wmma", XAVIER, "float16", 3, 7, 1, 12),
    ("wmma", XAVIER, "int8", 8, 4, 2, 256),
    ("mma", SM90, "float16", 3, 7, 1, 12),
]
PROMPT_CASES = [*PROMPT, *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in SLOW)]


def request_of(
    target: Target, cache: str, m: int, heads: int, kv_heads: int, d: int, capacity: int, attrs: Mapping[str, float]
) -> Request:
    q, span = TensorSpec((m, heads * d), "float32"), TensorSpec((2,), "int32")
    if cache == "int8":
        scales = [TensorSpec((kv_heads, capacity), "float32")] * 2
        keys = TensorSpec((kv_heads, capacity // 16, d // 2, 32), cache)
        values = TensorSpec((kv_heads, capacity // 2, 2 * -(-d // 16) * 16), cache)
        args = (q, keys, values, *scales, span)
    else:
        keys = TensorSpec((kv_heads, capacity // 16, d, 16), cache)
        args = (q, keys, TensorSpec((kv_heads, capacity, d), cache), span)
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": d, "scale": d**-0.5, "softcap": 0.0, "window": 0}
    op = "quern.attention" + ("_int8" if cache == "int8" else "")
    return Request(op, args, (q,), {**sizes, **attrs}, target)


@dataclass(frozen=True)
class Case:
    """A kernel and the sizes it is for."""

    made: Emulated
    cache: str
    m: int
    heads: int
    kv_heads: int
    d: int
    attrs: Mapping[str, float]

    @property
    def family(self) -> str:
        return self.made.kernel.name.split("_")[1]


def case(
    target: Target, cache: str, m: int, heads: int, kv_heads: int, d: int, knobs: Mapping[str, int] | None = None,
    **attrs: float,
) -> Case:  # fmt: skip
    call = replace(request_of(target, cache, m, heads, kv_heads, d, CAPACITY, attrs), knobs=knobs or {})
    return Case(Emulated(lowerings()[call.op](call), target, call.outs), cache, m, heads, kv_heads, d, attrs)


def fp16_rounding(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> float:
    """What rounding to fp16 adds, absolutely.

    An element of q is off by 2^-11 of itself, or 2^-25 of the row's largest; a score by the sum of such; that counts
    twice (numerator, sum). A weight is rounded to 2^-11 of itself, or 2^-25 of the block's largest, which the sum has.
    """
    keys, size = (
        np.repeat(np.abs(keys), q.shape[1] // keys.shape[0], 0).astype(np.float64),
        np.abs(q.astype(np.float64)),
    )
    score = EPS16 * np.einsum("mhd,hpd->mhp", size, keys).max() + SMALLEST16 * size.max() * keys.sum(-1).max()
    weight = 2 * np.expm1(min(score * scale, 1.0)) + EPS16 + keys.shape[1] * SMALLEST16
    return float(weight * np.abs(values.astype(np.float64)).max())


def check(made: Case, q: np.ndarray, keys: np.ndarray, values: np.ndarray, scales: Any, start: int, valid: int) -> None:
    """Positions that nobody may see hold what would show: NaN or the largest codes and scales."""
    end, attrs = start + valid, made.attrs
    scale, softcap, window = (
        float(attrs.get(k, v)) for k, v in (("scale", made.d**-0.5), ("softcap", 0), ("window", 0))
    )
    keys, values, span = keys.copy(), values.copy(), np.array([start, valid], np.int32)
    if scales is None:
        real_keys, real_values = keys[:, :end].astype(np.float64), values[:, :end].astype(np.float64)
        keys[:, end:], values[:, end:] = 6e4, np.nan
        args = [block_keys(keys), values, span]
    else:
        k_scale, v_scale = (s.copy() for s in scales)
        real_keys, real_values = (x[:, :end] * s[:, :end, None].astype(np.float64)
                                  for x, s in ((keys, k_scale), (values, v_scale)))  # fmt: skip
        keys[:, end:], values[:, end:], k_scale[:, end:], v_scale[:, end:] = 127, -128, 1e30, 1e30
        args = [*test_attention_int8.pack(keys, values), k_scale, v_scale, span]
    want = oracle(q[:valid], real_keys, real_values, start, scale, softcap, int(window))
    limit = tolerance(q * np.float32(scale * made.d**0.5), real_keys, real_values, made.d, end)
    limit += 2 * TANH2_ERROR * softcap * np.abs(real_values).max()
    if made.family in HALF:
        limit += fp16_rounding(q[:valid], real_keys, real_values, scale)
    elif scales is not None:
        limit += test_attention_int8.rounding(q, real_keys, real_values, made.d, end, scale)
    (got,) = made.made(q.reshape(made.m, -1), *args)
    np.testing.assert_allclose(got.reshape(q.shape)[:valid], want, rtol=0, atol=limit)


def random(made: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
    rng = np.random.default_rng(made.d)
    q = rng.standard_normal((made.m, made.heads, made.d)).astype(np.float32)
    if made.cache == "int8":
        (keys, values), scales = test_attention_int8.random(rng, made.kv_heads, made.d)
        return q, keys, values, scales
    keys, values = (rng.standard_normal((made.kv_heads, CAPACITY, made.d)).astype(made.cache) for _ in range(2))
    return q, keys, values, None


@pytest.mark.parametrize("sizes", DECODE, ids=lambda s: "-".join(map(str, s)))
def test_one_token(sizes: Any) -> None:
    cache, heads, kv_heads, d = sizes
    made = case(NANO, cache, 1, heads, kv_heads, d, {"chunk": 64, "rows": 1, "threads": 128} if d == 10 else None)
    assert made.family == "decode"
    for start in (0, 15, 63, 64, 150, CAPACITY - 1):
        check(made, *random(made), start, 1)


def test_one_part_needs_no_merge() -> None:
    made = case(ORIN, "float16", 1, 4, 2, 32, {"chunk": 512, "rows": 2, "threads": 64})
    assert len(made.made.kernel.launches) == 1
    for start in (0, CAPACITY - 1):
        check(made, *random(made), start, 1)


@pytest.mark.parametrize("sizes", PROMPT_CASES, ids=lambda s: "-".join(map(str, (s[0], *s[2:]))))
def test_prompts(sizes: Any) -> None:
    family, target, cache, m, heads, kv_heads, d = sizes
    made = case(target, cache, m, heads, kv_heads, d)
    assert made.family == family
    for start, valid in ((0, m), (15, m - 2), (CAPACITY - m, m)):
        check(made, *random(made), start, valid)


WINDOWS = [
    (NANO, "float16", 1), (NANO, "int8", 1), (NANO, "float32", 16), (XAVIER, "int8", 16), (ORIN, "float16", 16),
]  # fmt: skip


@pytest.mark.parametrize(("target", "cache", "m"), WINDOWS, ids=lambda v: getattr(v, "name", v))
def test_windows_and_caps(target: Target, cache: str, m: int) -> None:
    made = case(target, cache, m, 6, 2, 32, window=40, softcap=30.0, scale=0.2)
    q, keys, values, scales = random(made)
    for start, valid in ((0, m), (39, m), (127, max(1, m - 2)), (CAPACITY - m, m)):
        before = max(0, start - 39)  # what no row sees: it would take all weight
        loud = keys.copy()
        loud[:, :before] = 127 if cache == "int8" else 6e4
        check(made, q, loud, values, scales, start, valid)


@pytest.mark.parametrize(
    ("target", "m"), [(NANO, 1), (NANO, 4), (XAVIER, 4), (ORIN, 4)], ids=lambda v: getattr(v, "name", v)
)
def test_extreme_scores(target: Target, m: int) -> None:
    """Queries from 0 to where every score is beyond fp16; maxima that rise from block to block; one position of all."""
    made = case(target, "float16", m, 2, 1, 64)
    q, keys, values, _ = random(made)
    rising = keys.copy()
    rising[0, :, 0] = np.arange(CAPACITY) / 8
    for factor in (0, 1e-40, 1e-30, 30):
        check(made, q * np.float32(factor), rising, values, None, CAPACITY - m, m)
    one_hot, span = keys.copy(), np.array([CAPACITY - m, m], np.int32)
    one_hot[0, 77] = np.sign(q[0, 0]) * np.float16(6e4)
    (got,) = made.made(
        np.tile(q[:1, :1] * np.float32(1e4), (m, 2, 1)).reshape(m, 128), block_keys(one_hot), values, span
    )
    assert np.array_equal(got, np.tile(values[0, 77].astype(np.float32), (m, 2)))


@pytest.mark.parametrize(("target", "m"), [(NANO, 1), (ORIN, 3)], ids=lambda v: getattr(v, "name", v))
def test_extreme_scales(target: Target, m: int) -> None:
    """Scales of an int8 cache from 0 to 1e30; and a sum of 256 products at its bound."""
    made = case(target, "int8", m, 2, 1, 64)
    q, keys, values, scales = random(made)
    for k_factor, v_factor in ((0, 1), (1, 0), (1e-38, 1e4), (1, 1e30)):
        sized = (scales[0] * np.float32(k_factor), scales[1] * np.float32(v_factor))
        check(made, q, keys, values, sized, 200, m)
    ones = np.full((1, CAPACITY), 1 / 127, np.float32)
    for key, value in ((127, 127), (-127, -127)):
        codes = test_attention_int8.pack(np.full_like(keys, key), np.full_like(values, value))
        (got,) = made.made(
            np.full((m, 128), 3.5, np.float32), *codes, ones, ones, np.array([CAPACITY - m, m], np.int32)
        )
        np.testing.assert_allclose(got, np.sign(value), rtol=CAPACITY * 2.0**-24 if m == 1 else 2 * EPS16)


BROKEN = {  # text of a kernel, what it becomes, and what must come of it
    "scores are read before they are there": (
        NANO,
        1,
        "  block_sync();\n  for (int r = warp; r < ROWS",
        "  for (int r = warp; r < ROWS",
        EmulationError,
    ),
    "an exchange with the wrong lane": (
        NANO,
        1,
        "shuffle_xor(given, mask)",
        "shuffle_xor(given, mask ^ 3)",
        AssertionError,
    ),
    "parts that do not add up": (NANO, 1, "total = fmaf(factor,", "total = fmaf(1.0f,", AssertionError),
    "values not waited for": (ORIN, 16, "async_wait<1>();", "async_wait<2>();", EmulationError),
    "keys overwritten too early": (
        ORIN,
        16,
        "    block_sync();\n    if (base + BLOCK <= last) stage",
        "    if (base + BLOCK <= last) stage",
        EmulationError,
    ),
    "old sums not brought down": (XAVIER, 16, "sums[s][i] *= factors[i];", "sums[s][i] *= 1.0f;", AssertionError),
    "a tile's last reader ignored": (
        NANO,
        16,
        "    block_sync();  // the last block's values have been read\n",
        "",
        EmulationError,
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_kernels_are_caught(what: str) -> None:
    hardware.require_emulator()
    target, m, text, other, error = BROKEN[what]
    made = case(target, "float16", m, 8, 2, 32)
    source = made.made.kernel.source
    assert text in source
    broken = replace(
        made, made=replace(made.made, kernel=replace(made.made.kernel, source=source.replace(text, other)))
    )
    q, keys, values, _ = random(made)
    keys[:, :, 0] += np.arange(CAPACITY, dtype=np.float16) / 16  # maxima differ from block to block
    with pytest.raises(error):
        check(broken, q, keys, values, None, 200, m)


# Registers of a thread with d = 128: 128 leave room for 512 threads on a multiprocessor, 184 for 352, 255 for 256.
BUDGETS = {"decode": 128, "tile": 128, "wmma": 184, "mma": 255}
REAL = [("float16", 32, 8, 128), ("int8", 32, 8, 128)]  # other heads: test_sweep


@pytest.mark.parametrize("target", ALL, ids=lambda t: t.name)
@pytest.mark.parametrize("sizes", REAL, ids=lambda s: "-".join(map(str, s)))
def test_registers(target: Target, sizes: Any) -> None:
    cache, heads, kv_heads, d = sizes
    for m in (1, 128):
        call = request_of(target, cache, m, heads, kv_heads, d, 4096, {})
        made = Emulated(lowerings()[call.op](call), target, call.outs)
        family = made.kernel.name.split("_")[1]
        check_resources(made.code, BUDGETS[family])
        text = made.code.ptx.decode()
        assert not re.search(r"(?:ld|st)\.local", text)
        instruction = {"mma": "mma.sync.aligned.m16n8k16", "wmma": "wmma.mma", "decode": "ld.global.nc.v4.u32"}
        assert instruction.get(family, "fma.rn.f32") in text
        if family == "decode" and cache == "int8":
            assert ("dp2a" in text) == (target.gpu is not None and target.gpu.sm >= 61)


@pytest.mark.parametrize("target", [NANO, SM90], ids=lambda t: t.name)
def test_knobs(target: Target) -> None:
    call = request_of(target, "float16", 1, 16, 4, 64, 2048, {})
    found = attention_decode.space(call)
    found.check(found.default)
    assert found.allowed(found.default)
    names = {attention_decode.lower(replace(call, knobs=point)).name for point in found.points()}
    assert len(names) == len(list(found.points())) > 10


def test_parts_fill_the_chip() -> None:
    """Nano's one multiprocessor has long parts, an H100 short ones."""
    chosen = {t.name: attention_decode.lower(request_of(t, "float16", 1, 32, 8, 128, 4096, {})) for t in ALL}
    parts = {name: kernel.launches[0].grid[0] for name, kernel in chosen.items()}
    assert parts == {"jetson-nano": 16, "jetson-xavier": 16, "jetson-orin": 16, "cuda-sm90": 64}


def test_the_first_position_by_hand() -> None:  # scores 0 and ln 3: weights 1/4 and 3/4
    keys, values = np.zeros((1, 16, 1), np.float32), np.zeros((1, 16, 1), np.float32)
    keys[0, 1], values[0, :2, 0] = np.log(3), [4, 8]
    call = request_of(NANO, "float32", 1, 1, 1, 1, 16, {})
    made = Emulated(lowerings()[call.op](call), NANO, call.outs)
    (got,) = made(np.ones((1, 1), np.float32), block_keys(keys), values, np.array([1, 1], np.int32))
    assert got.tolist() == [[pytest.approx(7, abs=1e-6)]]


def test_specs_are_the_cpus() -> None:
    """The layouts tested here are those of the CPU kernels' tests."""
    keys = np.zeros((2, 32, 20), np.float16)
    call = request_of(NANO, "float16", 1, 2, 2, 20, 32, {})
    assert call.args[1:3] == (spec(block_keys(keys)), spec(keys))
