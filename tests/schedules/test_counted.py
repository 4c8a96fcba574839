"""A call of fewer tokens than a kernel has room for: what it gives, what it leaves alone, what it must not touch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

import targets
from compiler.measure import emulator
from compiler.tune.candidates import generate
from compiler.tune.inputs import canonical
from schedules import counted, vector
from schedules.isa import neon_dotprod, neon_i8mm
from schedules.kernel import Kernel, Request, TensorSpec, lowerings
from targets import Target
from tests.schedules import emulated
from tests.schedules.kernels import AVX2, NATIVE
from tests.schedules.linears import require, stand_in
from tests.schedules.test_linear_int8_amx import AMX

M, N, K, SPANS, CAPACITY, PAST = 128, 40, 192, 3, 160, 7
REAL = (1, 5, 17, 127)
MOST_TILE = 32  # tokens of the largest tile of any family: no row beyond the last real one's tile is written
UNTOUCHED = 77
ISAS: dict[str, Any] = {"neon_dotprod": neon_dotprod, "neon_i8mm": neon_i8mm}
DOTPROD, I8MM = stand_in(ISAS["neon_dotprod"]), stand_in(ISAS["neon_i8mm"])


def f32(*shape: int) -> TensorSpec:
    return TensorSpec(shape, "float32")


X, GATE_UP, IDS = f32(M, K), f32(M, 2 * K), TensorSpec((M,), "int32")
ROWS = (TensorSpec((M, SPANS, 64), "int8"), f32(M, SPANS), TensorSpec((M, SPANS), "int32"))
WEIGHT = (TensorSpec((N, K), "uint8"), TensorSpec((N, SPANS), "float16"), TensorSpec((N, SPANS), "int16"))
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 32}
CACHE = (TensorSpec((2, CAPACITY // 16, 32, 16), "float16"), TensorSpec((2, CAPACITY, 32), "float16"))
INT8_CACHE = (
    TensorSpec((2, CAPACITY // 16, 16, 32), "int8"), TensorSpec((2, CAPACITY // 2, 64), "int8"),
    f32(2, CAPACITY), f32(2, CAPACITY),
)  # fmt: skip
SPAN = TensorSpec((2,), "int32")
ATTENTION = {**HEADS, "scale": 0.2, "softcap": 0.0, "window": 0}
INT4 = {"bits": 4, "group": 64}

CASES: dict[str, tuple[str, Sequence[TensorSpec], Sequence[TensorSpec], dict[str, Any]]] = {
    "linear_int8": ("linear_int8_residual", (*ROWS, *WEIGHT, f32(M, N)), [f32(M, N)], INT4),
    "linear_exact": ("linear_exact_residual", (X, *WEIGHT, f32(M, N)), [f32(M, N)], INT4),
    "linear_dense": ("linear_dense", (X, TensorSpec((N, K), "float16")), [f32(M, N)], {}),
    "quantize": ("quantize", (X,), ROWS, {"group": 64}),
    "gather": ("gather", (X, TensorSpec((K,), "int32")), [X], {}),
    "rms_norm": ("rms_norm_quantize", (X, f32(K)), ROWS, {"eps": 1e-5, "group": 64}),
    "swiglu": ("swiglu_quantize", (GATE_UP,), ROWS, {"group": 64}),
    "geglu": ("geglu", (GATE_UP,), [X], {}),
    "softcap": ("softcap", (f32(M, 4107),), [f32(M, 4107)], {"cap": 3.0}),
    "add": ("add", (X, X), [X], {}),
    "add_bias": ("add_bias", (X, f32(K)), [X], {}),
    "concat": ("concat", (X, X), [GATE_UP], {}),
    "embedding": ("embedding", (IDS, TensorSpec((256, K), "float16")), [X], {}),
    "embedding_quantized": (
        "embedding_quantized",
        (IDS, TensorSpec((256, K), "uint8"), TensorSpec((256, SPANS), "float16"), TensorSpec((256, SPANS), "int16")),
        [X],
        {**INT4, "times": 1.0},
    ),
    "attention": ("attention", (f32(M, 128), *CACHE, SPAN), [f32(M, 128)], ATTENTION),
    "attention_int8": ("attention_int8", (f32(M, 128), *INT8_CACHE, SPAN), [f32(M, 128)], ATTENTION),
}  # fmt: skip
ROPE = {
    "rope_append": (f32(M, 256), f32(CAPACITY, 32), SPAN, *CACHE),
    "rope_append_int8": (f32(M, 256), f32(CAPACITY, 32), SPAN, *INT8_CACHE),
}


class Runner:
    """A kernel on this machine or an emulated one; `outs` come filled with UNTOUCHED and as the kernel leaves them."""

    def __init__(self, request: Request, folder: Path, cpu: str | None = None) -> None:
        self.request, self.cpu = request, cpu
        self.kernel: Kernel = lowerings()[request.op](request)
        self.emulated = request.target.arch != NATIVE.arch
        made = generate({self.kernel.name: self.kernel.func}, request.target)
        if self.emulated:
            emulated.require(request.target.arch)
            (code,) = (module for module in (made.mod, *made.mod.imports) if module.kind == "llvm")
            self.program = emulator.link(code, [self.kernel.name], request.target, folder / "program")
        else:
            require(request.target)
            self.function = made[self.kernel.name]

    def __call__(self, arrays: dict[str, np.ndarray], rows: int) -> list[np.ndarray]:
        """Fresh outputs; what is written in place is in `arrays`."""
        given = {name: array.copy() for name, array in arrays.items()}
        names = list(arrays)
        for i, packing in self.kernel.packings.items():
            given[names[i]] = packing.pack(given[names[i]])
        if self.kernel.counted:
            given["span"] = np.array([PAST, rows], np.int32)
        outs = {f"out{i}": np.full(out.shape, UNTOUCHED, out.dtype) for i, out in enumerate(self.request.outs)}
        if self.emulated:
            call = emulator.Call(self.kernel.name, (*given, *outs))
            return self.program.run({**given, **outs}, [call], list(outs), self.cpu)
        tensors = {name: tvm.runtime.tensor(array) for name, array in {**given, **outs}.items()}
        self.function(*tensors.values())
        for name in arrays:
            if name.endswith("_cache") or name in ("k_scale", "v_scale"):
                arrays[name][...] = tensors[name].numpy()
        return [tensors[name].numpy() for name in outs]


def poisoned(arrays: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """What kernels may find behind the real rows: no numbers, the one code that is not allowed, ids of nothing."""
    found = {}
    for name, array in arrays.items():
        found[name] = array.copy()
        if name == "span":
            found[name][:] = PAST, rows
        elif len(array) == M:
            found[name][rows:] = np.nan if array.dtype.kind == "f" else np.iinfo(array.dtype).min
    return found


def check(case: str, target: Target, folder: Path, real: Sequence[int] = REAL, cpu: str | None = None) -> Runner:
    """Every number of real rows gives the bits of a full call, and leaves the rest of the outputs as it was."""
    op, args, outs, attrs = CASES[case]
    run = Runner(Request(f"quern.{op}", tuple(args), tuple(outs), attrs, target), folder, cpu)
    arrays = canonical(run.request)
    if "ids" in arrays:
        arrays["ids"] %= 256
    whole = run(poisoned(arrays, M), M)
    assert all(np.isfinite(out).all() and (out[-1] != UNTOUCHED).any() for out in whole)
    for rows in real:
        for got, want in zip(run(poisoned(arrays, rows), rows), whole, strict=True):
            assert np.array_equal(got[:rows], want[:rows]), rows
            assert (got[-(-rows // MOST_TILE) * MOST_TILE :] == UNTOUCHED).all(), rows
    return run


@pytest.mark.parametrize("case", CASES)
def test_some_rows_of_a_kernel(case: str, tmp_path: Path) -> None:
    assert check(case, NATIVE, tmp_path).kernel.counted != case.startswith("attention")  # that has its own span


@pytest.mark.parametrize(
    ("case", "target", "cpu", "family"),
    [
        ("linear_int8", AVX2, None, "avx2"),
        ("linear_int8", AMX, None, "amx"),
        ("linear_int8", targets.load("rpi4"), "cortex-a72", "widening"),
        ("linear_int8", DOTPROD, "max", "neon_dotprod"),
        ("linear_int8", I8MM, "max", "smmla"),
        ("attention", targets.load("rpi4"), "cortex-a72", "widened"),
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)  # fmt: skip
def test_some_rows_elsewhere(case: str, target: Target, cpu: str | None, family: str, tmp_path: Path) -> None:
    assert family in check(case, target, tmp_path, (17,), cpu).kernel.name


@pytest.mark.parametrize("op", ROPE)
def test_two_calls_leave_the_cache_of_one(op: str, tmp_path: Path) -> None:
    request = Request(f"quern.{op}", ROPE[op], (f32(M, 128),), HEADS, NATIVE)
    run = Runner(request, tmp_path)
    once = canonical(request)
    once["span"][:] = PAST, M
    twice = {name: array.copy() for name, array in once.items()}
    (want,) = run(once, M)
    for rows in REAL:
        first, second = poisoned(twice, rows), {name: array.copy() for name, array in twice.items()}
        (low,) = run(first, rows)
        caches = {name: array for name, array in first.items() if name in ("k_cache", "v_cache", "k_scale", "v_scale")}
        second |= caches
        second["qkv"][: M - rows], second["span"][:] = second["qkv"][rows:].copy(), (PAST + rows, M - rows)
        (high,) = run(second, M - rows)
        assert np.array_equal(np.concatenate([low[:rows], high[: M - rows]]), want)
        assert (low[rows:] == UNTOUCHED).all() and (high[M - rows :] == UNTOUCHED).all()
        for name in caches:
            assert np.array_equal(second[name], once[name]), (name, rows)


def marked(m: int) -> Any:
    """out[t] = t for every token."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        out = T.arg("out", T.buffer((m,), "int32"))
        with T.sblock("root"):
            T.reads()
            T.writes(out[0:m])
            with vector.tokens(m) as t:
                T.buffer_store(out, t, [t])
    return builder.get()


def test_a_marked_loop_by_hand() -> None:
    before = Kernel("some", marked(8))
    after = counted.counted(before, 0)
    assert [param.name for param in after.func.params] == ["span", "out"]
    loop = after.func.body.block.body
    tvm.ir.assert_structural_equal(loop.extent, tirx.BufferLoad(after.func.params[0], [1]), True)
    assert (loop.kind, dict(loop.annotations)) == (tirx.ForKind.PARALLEL, {})
    assert (before.counted, after.counted) == (False, True)


def test_one_token_stays_as_it_is() -> None:
    kernel = Kernel("some", marked(1))
    assert counted.counted(kernel, 0) is kernel
