"""The plain CUDA kernels in the emulator against numpy, all in one compile; and what ptxas says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle
from typing import Any

import numpy as np
import pytest

import targets
from compiler.codegen import nvrtc
from compiler.codegen.cuda import device_code
from compiler.quant.grids import GRIDS
from compiler.quant.reference import dequantize
from schedules.cuda import elementwise, embedding, linear_exact, rms_norm, rope
from schedules.cuda.kernel import CudaKernel
from schedules.kernel import Request, TensorSpec, space
from tests.emulator import cuda
from tests.schedules.kernels import EPS32, spec
from tests.schedules.test_linear_grids import weight, weight_arguments
from tests.schedules.test_rope import angles, block_keys, oracle, unpack

LOWERS = {
    op: lower
    for module in (elementwise, embedding, linear_exact, rms_norm, rope)
    for op, lower in module.LOWERS.items()
}
GPUS = ("jetson-nano", "jetson-xavier", "jetson-orin", "cuda-sm90")
REGISTERS = 80  # of a thread: three blocks of 256 threads share the 65536 of a multiprocessor
EXP2 = 4 * 2.0**-23  # exp2_approx is within 2 units in the last place, and its argument is rounded
F32 = np.float32
rng = np.random.default_rng(5)


def any_point(request: Request) -> Mapping[str, int]:
    """Of a kernel with blocks of any size; points of matrices are test_knobs' affair."""
    found = space(request)
    assert found is not None
    points = list(found.points())
    return {} if "linear" in request.op else points[rng.integers(len(points))]


POINTS = cycle((lambda request: {}, any_point))  # every other case: all kinds have several


@dataclass(frozen=True)
class Case:
    """A request, its arrays (outputs last, then checked), and the check of what the kernel left in them."""

    name: str
    request: Request
    arrays: tuple[np.ndarray, ...]
    check: Callable[[tuple[np.ndarray, ...]], None]

    @property
    def kernel(self) -> CudaKernel:
        return LOWERS[self.request.op](self.request)


def case(
    op: str, args: list[np.ndarray], out: tuple[int, ...], check: Callable[..., None], name: str = "", **attrs: Any
) -> Case:
    table = GRIDS[str(attrs["grid"])].values if "grid" in attrs else None
    outs = (TensorSpec(out, "float32"),)
    target = targets.load("cuda-sm90")
    request = Request(f"quern.{op}", tuple(map(spec, args)), outs, attrs, target, table=table)
    request = replace(request, knobs=next(POINTS)(request))
    return Case(f"{op} {name}".strip(), request, (*args, np.full(out, np.nan, F32)), check)


def close(want: np.ndarray, bound: Any) -> Callable[[tuple[np.ndarray, ...]], None]:
    def check(arrays: tuple[np.ndarray, ...]) -> None:
        worst = (np.abs(arrays[-1].astype(np.float64) - want) / np.maximum(bound, 2.0**-120)).max()
        assert worst <= 1, f"{worst} times the bound"

    return check


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(F32)


def elementwise_cases() -> Iterator[Case]:
    for m, n in ((1, 8), (3, 300)):
        a, b = normal(m, n), normal(m, n)
        yield case("add", [a, b], (m, n), close(a + b, 0))
        yield case("add_bias", [a, b[0].copy()], (m, n), close(a + b[0], 0))
        yield case("concat", [a, normal(m, 5)], (m, n + 5), lambda got: None)
        order = rng.permutation(n).astype(np.int32)
        yield case("gather", [a, order], (m, n), close(a[:, order], 0))
        span = np.array([4, m], np.int32)
        yield case("last_row", [a, span], (1, n), close(a[-1:], 0))
        x = (a * 10 ** rng.uniform(-6, 3, a.shape)).astype(F32)
        want = 30 * np.tanh(x.astype(np.float64) / 30)
        yield case("softcap", [x], (m, n), close(want, 16 * EPS32 * np.abs(want) + 2.0**-120), cap=30.0)
        gates = np.concatenate([x, b], 1)
        g, up = x.astype(np.float64), b.astype(np.float64)
        with np.errstate(over="ignore"):
            silu = g / (1 + np.exp(-g)) * up
            u = np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)
            gelu = g / (1 + np.exp(-2 * u)) * up
        # Below the held exponent 126 a true value is smaller than |g up| 2^-126; above, the exponent's rounding grows.
        tiny = np.abs(g * up) * 2.0**-125
        yield case("swiglu", [gates], (m, n), close(silu, np.abs(silu) * (EXP2 + np.abs(g) * 2**-22) + tiny))
        yield case("geglu", [gates], (m, n), close(gelu, np.abs(gelu) * (EXP2 + np.abs(u) * 2**-20) + tiny))


def norm_cases() -> Iterator[Case]:
    for m, d, size in ((1, 64, 1.0), (3, 700, 1e-4), (2, 33, 1e6)):
        x, w = (normal(m, d) * size).astype(F32), normal(d)
        wide = x.astype(np.float64)
        want = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * w
        bound = (d / 256 + 16) * EPS32 * np.abs(want)
        yield case("rms_norm", [x, w], (m, d), close(want, bound), f"{m}x{d}", eps=1e-5)


def embedding_cases() -> Iterator[Case]:
    ids = np.array([3, 0, 10], np.int32)
    table = normal(11, 40)
    half, brain = table.astype(np.float16), (table.view(np.uint32) >> 16).astype(np.uint16)
    yield case("embedding", [ids, table], (3, 40), close(table[ids] * F32(3), 0), "float32", scale=3.0)
    yield case("embedding", [ids, half], (3, 40), close(half[ids].astype(F32), 0), "float16", scale=1.0)
    wide = (brain.astype(np.uint32) << 16).view(F32)
    yield case("embedding", [ids, brain], (3, 40), close(wide[ids], 0), "bfloat16", scale=1.0)
    for grid in GRIDS:
        for offset in (False, True) if GRIDS[grid].values is None else (False,):
            d, group = (344, 172) if grid != "int6" else (34, 16)
            w = weight(grid, offset, 11, d, group)
            want = dequantize(w)[ids]
            bound = EPS32 * np.abs(w.scale[:, np.arange(d) // group] * w.codes)[ids] * 2 if offset else 0
            yield case(f"embedding_quantized{kind(grid, offset)}", [ids, *weight_arguments(w)], (3, d),
                       close(want, bound), grid, **coded(grid, group), times=1.0)  # fmt: skip


def kind(grid: str, offset: bool) -> str:
    return "_table" if GRIDS[grid].values is not None else "_offset" if offset else ""


def coded(grid: str, group: int) -> dict[str, int | str]:
    named: dict[str, int | str] = {"grid": grid} if GRIDS[grid].values is not None else {}
    return {**named, "bits": GRIDS[grid].bits, "group": group}


LINEARS = [  # grid, offset, m, n, k, group
    ("int2", False, 1, 40, 128, 64), ("int3", True, 3, 17, 172, 64), ("int4", False, 9, 33, 256, 128),
    ("int4", True, 1, 8, 172, 43), ("int5", False, 2, 17, 40, 40), ("int6", True, 1, 9, 72, 24),
    ("int8", False, 17, 5, 172, 172), ("nf4", False, 3, 33, 172, 43),
]  # fmt: skip


def linear_cases() -> Iterator[Case]:
    for i, (grid, offset, m, n, k, group) in enumerate(LINEARS):
        w, x, residual = weight(grid, offset, n, k, group), normal(m, k), normal(m, n)
        real, tail = dequantize(w).astype(np.float64), "_residual" * (i % 2)
        want = x.astype(np.float64) @ real.T + (residual if tail else 0)
        # A lane adds k / 32 products, five sums join the lanes; a weight itself is rounded twice, offsets may cancel.
        parts = np.abs(w.scale.astype(np.float64))[:, np.arange(k) // group] * (np.abs(w.codes) + 256.0)
        bound = (k / 32 + 12) * EPS32 * (np.abs(x) @ np.maximum(np.abs(real), parts).T + np.abs(want))
        args = [x, *weight_arguments(w), *([residual] if tail else [])]
        yield case(f"linear_exact{kind(grid, offset)}{tail}", args, (m, n), close(want, bound), f"{grid} {m}x{n}x{k}",
                   **coded(grid, group))  # fmt: skip
    for m, n, k, dtype in (
        (1, 9, 256, "float16"),
        (3, 9, 100, "float16"),
        (11, 3, 264, "uint16"),
        (2, 5, 33, "float32"),
    ):
        x, w32 = normal(m, k), normal(n, k)
        stored = (w32.view(np.uint32) >> 16).astype(np.uint16) if dtype == "uint16" else w32.astype(dtype)
        real = (stored.astype(np.uint32) << 16).view(F32) if dtype == "uint16" else stored.astype(F32)
        want = x.astype(np.float64) @ real.T.astype(np.float64)
        bound = (k / 32 + 12) * EPS32 * (np.abs(x) @ np.abs(real).T)
        yield case("linear_dense", [x, stored], (m, n), close(want, bound), f"{dtype} {m}x{n}x{k}")
        base = normal(m, n)
        bound = bound + EPS32 * np.abs(want + base)
        name = f"{dtype} {m}x{n}x{k}"
        yield case("linear_dense_residual", [x, stored, base], (m, n), close(want + base, bound), name)


ROPES = [  # m, heads, kv_heads, d, start, valid, cache, norm
    (1, 4, 4, 8, 0, 1, "float32", ""), (5, 3, 1, 80, 14, 5, "float16", ""), (5, 6, 2, 12, 30, 3, "float16", "each"),
    (3, 4, 2, 64, 45, 3, "float32", "all"), (5, 6, 2, 12, 30, 3, "int8", ""), (2, 3, 1, 64, 31, 2, "int8", "each"),
]  # fmt: skip


def rope_cases() -> Iterator[Case]:
    for m, heads, kv_heads, d, start, valid, cache_type, norm in ROPES:
        table, qkv = angles(d), normal(m, (heads + 2 * kv_heads) * d)
        rows = qkv.astype(np.float64).reshape(m, -1, d)[:valid]
        q, k, v = rows[:, :heads], rows[:, heads : heads + kv_heads], rows[:, heads + kv_heads :]
        weights = [] if not norm else [normal(d if norm == "each" else c * d) for c in (heads, kv_heads)]
        if norm:
            q, k = (_normed(part, w, norm, d) for part, w in zip((q, k), weights, strict=True))
        before = [rng.standard_normal((kv_heads, 48, d)) for _ in range(2)]
        if cache_type == "int8":
            shapes = (kv_heads, 3, d // 2, 32), (kv_heads, 24, 2 * -(-d // 16) * 16)
            caches = [rng.integers(-127, 128, shape).astype(np.int8) for shape in shapes]
            caches += [normal(kv_heads, 48) for _ in range(2)]
        else:
            caches = [block_keys(before[0].astype(cache_type)), before[1].astype(cache_type)]
        op = "rope_append" + "_norm" * bool(norm) + "_int8" * (cache_type == "int8")
        attrs: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": d, **({"eps": 1e-5} if norm else {})}
        args = [qkv, table, np.array([start, valid], np.int32), *weights, *caches]
        positions = start + np.arange(valid)
        want = [oracle(part, table, positions) for part in (q, k)]
        check = _rope_check(want[0], want[1], v, positions, [c.copy() for c in caches], valid)
        yield case(op, args, (m, heads * d), check, f"{cache_type} d{d} {norm}", **attrs)


def _normed(part: np.ndarray, w: np.ndarray, norm: str, d: int) -> np.ndarray:
    mean = (part**2).mean(axis=2 if norm == "each" else (1, 2), keepdims=True)
    return part / np.sqrt(mean + 1e-5) * (w if norm == "each" else w.reshape(-1, d))


def _rope_check(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, before: list[np.ndarray], valid: int
) -> Callable[[tuple[np.ndarray, ...]], None]:
    limit = 20 * EPS32 * 2 * max(np.abs(q).max(), np.abs(k).max())  # as tests/schedules/test_rope.py has it

    def check(arrays: tuple[np.ndarray, ...]) -> None:
        out = arrays[-1][:valid].reshape(q.shape)
        assert np.abs(out - q).max() <= limit
        assert np.isnan(arrays[-1][valid:]).all()  # rows of padding are not written
        caches, d = arrays[-1 - len(before) : -1], q.shape[2]
        others = np.setdiff1d(np.arange(48), positions)
        if len(before) == 4:
            old, new = unpack(before[0], before[1], d), unpack(caches[0], caches[1], d)
            for i, real in enumerate((k, v)):
                want, scale = real.transpose(1, 0, 2), caches[2 + i][:, positions].astype(np.float64)
                assert (np.abs(new[i][:, positions, :d].astype(int)).max(2) == 127).all()
                off = np.abs(new[i][:, positions, :d] * scale[..., None] - want)
                assert (off <= 0.5001 * scale[..., None] + limit).all()
                assert np.array_equal(new[i][:, others], old[i][:, others])
                assert np.array_equal(caches[2 + i][:, others], before[2 + i][:, others])
            return
        keys = caches[0].transpose(0, 1, 3, 2).reshape(caches[1].shape)
        known = before[0].transpose(0, 1, 3, 2).reshape(before[1].shape)
        half = 2.0**-11 if keys.dtype == np.float16 else 0.0
        want = k.transpose(1, 0, 2)
        assert (np.abs(keys[:, positions] - want) <= limit + half * np.abs(want) + 2.0**-25 * (half > 0)).all()
        assert np.array_equal(caches[1][:, positions], v.transpose(1, 0, 2).astype(keys.dtype))
        assert np.array_equal(keys[:, others], known[:, others])
        assert np.array_equal(caches[1][:, others], before[1][:, others])

    return check


CASES = [
    *elementwise_cases(), *norm_cases(), *embedding_cases(), *linear_cases(), *rope_cases(),
]  # fmt: skip


@cache
def unit() -> str:
    """Every kernel of every case, as one source."""
    return device_code.unit({case.kernel.name: case.kernel for case in CASES}.values())


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: CASES[i].name.replace(" ", "-"))
def test_in_the_emulator(number: int) -> None:
    case = CASES[number]
    kernel = case.kernel
    packed = [kernel.packings[i].pack(a) if i in kernel.packings else a.copy() for i, a in enumerate(case.arrays)]
    for i, packing in kernel.packings.items():
        assert spec(packed[i]) == packing.spec and packed[i].flags.c_contiguous
    cuda.run(replace(kernel, source=unit()), packed, 90)
    case.check(tuple(packed))


@pytest.mark.parametrize("name", GPUS)
def test_registers(name: str) -> None:
    gpu = targets.load(name).gpu
    assert gpu is not None
    used = nvrtc.compile(unit(), gpu).functions
    assert set(used) == {launch.function for case in CASES for launch in case.kernel.launches}
    assert not {name: r.spill_bytes for name, r in used.items() if r.spill_bytes}
    assert not {name: r.registers for name, r in used.items() if r.registers > REGISTERS}
