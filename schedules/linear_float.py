"""Linear layers on fp32 activations: the exact path for quantised weights, and weights that were never quantised.

    out[m, n] = (residual[m, n] +) sum_k w[n, k] * x[m, k]

Weights become fp32 as they are read. Integer codes: w = scale * (code - zero); the difference is exact, a span is
summed first and scaled once; a table grid's values alike. With an offset every weight is made whole before it is
multiplied, w = scale * code + offset: the sums of both parts would be large and cancel. Dense weights: float16, or
bfloat16 bits in uint16, or float32.
Operators (arguments in order; *_residual has residual f32[m, n] last):
  quern.linear_exact         x f32[m, k], codes u8[n, k], scale f16|f32[n, groups], zero i16[n, groups]; bits, group
                             -> f32[m, n]
  quern.linear_exact_offset  offset f32[n, groups] instead of zero
  quern.linear_exact_table   neither; grid, bits, group; the request's table has the values of the codes
  quern.linear_dense   x f32[m, k], weight f16|u16|f32[n, k] -> f32[m, n]
Layout: schedules.packed for codes; dense weights lie as [blocks, k, 16 rows].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import storage as storages
from schedules import vector
from schedules.counted import marks
from schedules.geometry import Geometry
from schedules.kernel import Kernel, Packing, Request, TensorSpec
from schedules.packed import affine_of, blocks, weight_packings
from schedules.storage import LANES, QUAD, Storage

TOKENS = 4  # accumulators per row block, so that a weight read once serves several tokens of a prompt
CHAINS = 4  # dense: partial sums by k modulo this, the same for every m, so that a prompt equals its single tokens
DENSE_TOKENS = 2  # x CHAINS accumulators of 16 lanes fit the registers of AVX2

Accumulate = Callable[[Any, Any, Any], None]  # (row block, token block start, accumulator buffer)


def _tokens_at_once(m: int, most: int) -> int:
    return next(t for t in range(min(m, most), 0, -1) if m % t == 0)


def _rows_in_parallel(m: int, n: int, tokens: int, accumulate: Accumulate, base: Any, out: Any) -> None:
    """Every row block on its own; in it token blocks, each with fp32 accumulators [tokens, 16] that end in `out`."""
    nb = blocks(n)
    with T.parallel(0, nb) as row_block:
        with T.serial(0, m // tokens, annotations=marks(tokens) if m > 1 else None) as token_block:
            with T.sblock("rows"):
                vb = T.axis.spatial(nb, row_block)
                vt = T.axis.spatial(m // tokens, token_block)
                T.reads()
                T.writes(out[vt * tokens : vt * tokens + tokens, vb * LANES : vb * LANES + LANES])
                acc = T.sblock_alloc_buffer((tokens, LANES), "float32")
                for t in range(tokens):
                    T.buffer_store(acc, T.broadcast(T.float32(0), LANES), [t, T.ramp(0, 1, LANES)])
                accumulate(vb, vt * tokens, acc)
                for t in range(tokens):
                    _store(n, vt * tokens + t, vb, acc, t, base, out)


def _store(n: int, row: Any, vb: Any, acc: Any, t: int, base: Any, out: Any) -> None:
    if n == blocks(n) * LANES:
        columns = T.ramp(vb * LANES, 1, LANES)
        value = acc[t, T.ramp(0, 1, LANES)]
        T.buffer_store(out, value if base is None else base[row, columns] + value, [row, columns])
        return
    with T.serial(0, LANES) as lane:
        column = vb * LANES + lane
        with T.If(column < n), T.Then():
            value = acc[t, lane]
            T.buffer_store(out, value if base is None else base[row, column] + value, [row, column])


def _exact(
    m: int,
    n: int,
    geometry: Geometry,
    storage: Storage,
    scale_dtype: str,
    residual: bool,
    affine: str,
    table: tuple[float, ...] | None,
) -> Any:
    nb, spans, width = blocks(n), geometry.spans, geometry.width
    steps, tokens = width // storage.inputs, _tokens_at_once(m, TOKENS)
    lanes = T.ramp(0, 1, LANES)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
            x = T.arg("x", T.buffer((m, geometry.k), "float32"))
            codes = T.arg("codes", T.buffer((nb, spans, steps, 1, storage.vectors, LANES, QUAD), "uint8"))
            scale = T.arg("scale", T.buffer((nb, spans, 1, LANES), scale_dtype))
            zero = T.arg("zero", T.buffer((nb, spans, 1, LANES), "uint8")) if affine == "zero" else None
            offset = T.arg("offset", T.buffer((nb, spans, 1, LANES), "float32")) if affine == "offset" else None
            base = T.arg("residual", T.buffer((m, n), "float32")) if residual else None
            out = T.arg("out", T.buffer((m, n), "float32"))

            def activation(row: Any, s: Any, place: Any) -> Any:
                if geometry.dense:
                    return x[row, s * width + place]
                inside = T.floormod(s, geometry.parts) * geometry.span + place
                k = T.floordiv(s, geometry.parts) * geometry.group + inside
                valid = T.And(place < geometry.span, T.And(inside < geometry.group, k < geometry.k))
                return T.if_then_else(valid, x[row, T.min(k, geometry.k - 1)], T.float32(0))

            def accumulate(vb: Any, row: Any, acc: Any) -> None:
                part = T.sblock_alloc_buffer((tokens, LANES), "float32")
                with T.serial(0, spans) as s:
                    for t in range(tokens):
                        T.buffer_store(part, T.broadcast(T.float32(0), LANES), [t, lanes])
                    factor = T.bind(T.Cast(f"float32x{LANES}", scale[vb, s, 0, lanes]))
                    centre = T.bind(T.Cast(f"int32x{LANES}", zero[vb, s, 0, lanes])) if zero is not None else None
                    least = T.bind(offset[vb, s, 0, lanes]) if offset is not None else None
                    with T.serial(0, steps) as j:
                        stored = [codes.vload([vb, s, j, 0, v, 0, 0], "uint8x64") for v in range(storage.vectors)]
                        words = [T.bind(T.reinterpret(f"uint32x{LANES}", vector)) for vector in stored]
                        for f in range(storage.quads):
                            for b in range(QUAD):
                                code = T.Cast(f"int32x{LANES}", _code(storage, words, f, b))
                                if table is not None:
                                    weight = T.bind(vector.look_up(table, code, LANES))
                                elif centre is not None:
                                    weight = T.bind(T.Cast(f"float32x{LANES}", code - centre))
                                else:
                                    weight = T.bind(T.Cast(f"float32x{LANES}", code) * factor + least)
                                place = j * storage.inputs + f * QUAD + b
                                for t in range(tokens):
                                    value = T.broadcast(activation(row + t, s, place), LANES)
                                    T.buffer_store(part, part[t, lanes] + weight * value, [t, lanes])
                    for t in range(tokens):
                        scaled = part[t, lanes] if offset is not None else part[t, lanes] * factor
                        T.buffer_store(acc, acc[t, lanes] + scaled, [t, lanes])

            with T.sblock("root"):
                _rows_in_parallel(m, n, tokens, accumulate, base, out)
    return builder.get()


def _code(storage: Storage, words: list[Any], f: int, b: int) -> Any:
    """Codes of byte b in quad f: u32 vector of a lane each."""

    def field(vector: Any, place: int, bits: int) -> Any:
        mask = T.broadcast(T.uint32((1 << bits) - 1), LANES)
        return T.bitwise_and(T.shift_right(vector, T.broadcast(T.uint32(8 * b + place), LANES)), mask)

    low = field(words[f // storage.per_vector], f % storage.per_vector * storage.low, storage.low)
    if not storage.high:
        return low
    high = field(words[-1], f * storage.high, storage.high)
    return T.bitwise_or(low, T.shift_left(high, T.broadcast(T.uint32(storage.low), LANES)))


def _to_float(value: Any, dtype: str) -> Any:
    """float16, bfloat16 bits or float32 vector -> float32 vector, exactly."""
    if dtype == "uint16":
        bits = T.shift_left(T.Cast(f"uint32x{LANES}", value), T.broadcast(T.uint32(16), LANES))
        return T.reinterpret(f"float32x{LANES}", bits)
    return T.Cast(f"float32x{LANES}", value)


def _dense(m: int, n: int, k: int, dtype: str, residual: bool) -> Any:
    nb, tokens = blocks(n), _tokens_at_once(m, DENSE_TOKENS)
    unroll = next(u for u in range(CHAINS, 0, -1) if k % u == 0)
    lanes = T.ramp(0, 1, LANES)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
            x = T.arg("x", T.buffer((m, k), "float32"))
            weight = T.arg("weight", T.buffer((nb, k, LANES), dtype))
            base = T.arg("residual", T.buffer((m, n), "float32")) if residual else None
            out = T.arg("out", T.buffer((m, n), "float32"))

            def accumulate(vb: Any, row: Any, acc: Any) -> None:
                # Partial sums by k modulo `unroll`: independent chains hide the multiply-add latency.
                chains = T.sblock_alloc_buffer((tokens, unroll, LANES), "float32")
                for t in range(tokens):
                    for u in range(unroll):
                        T.buffer_store(chains, T.broadcast(T.float32(0), LANES), [t, u, lanes])
                with T.serial(0, k // unroll) as step:
                    for u in range(unroll):
                        w = T.bind(_to_float(weight[vb, step * unroll + u, lanes], dtype))
                        for t in range(tokens):
                            value = T.broadcast(x[row + t, step * unroll + u], LANES)
                            T.buffer_store(chains, chains[t, u, lanes] + w * value, [t, u, lanes])
                for t in range(tokens):
                    for u in range(unroll):
                        T.buffer_store(acc, acc[t, lanes] + chains[t, u, lanes], [t, lanes])

            with T.sblock("root"):
                _rows_in_parallel(m, n, tokens, accumulate, base, out)
    return builder.get()


def _pack_dense(weight: np.ndarray) -> np.ndarray:
    """[n, k] -> [blocks, k, 16], rows padded with zeros."""
    n, k = weight.shape
    padded = np.pad(weight, ((0, blocks(n) * LANES - n), (0, 0)))
    return np.ascontiguousarray(padded.reshape(blocks(n), LANES, k).transpose(0, 2, 1))


def lower_exact(request: Request) -> Kernel:
    """Quantised weights, fp32 activations."""
    (m, k), (n, _) = request.args[0].shape, request.args[1].shape
    geometry, scale_dtype = Geometry(k, int(request.attrs["group"])), request.args[2].dtype
    affine, residual = affine_of(request.op), request.op.endswith("_residual")
    storage = storages.choose(int(request.attrs["bits"]), geometry.width)
    kind = request.attrs.get("grid", storage.name)
    tail = ("_offset" if affine == "offset" else "") + ("_residual" if residual else "")
    return Kernel(
        name=f"linear_{kind}a32_m{m}_n{n}_k{k}_g{geometry.group}_s{scale_dtype[5:]}{tail}",
        func=_exact(m, n, geometry, storage, scale_dtype, residual, affine, request.table),
        packings=weight_packings(1, n, geometry, storage, scale_dtype, affine),
    )


def lower_dense(request: Request) -> Kernel:
    """Weights as the checkpoint has them."""
    (m, k), weight, residual = request.args[0].shape, request.args[1], request.op.endswith("_residual")
    n = weight.shape[0]
    kind = {"float16": "f16", "uint16": "bf16", "float32": "f32"}[weight.dtype]
    spec = TensorSpec((blocks(n), k, LANES), weight.dtype)
    return Kernel(
        name=f"linear_{kind}_m{m}_n{n}_k{k}{'_residual' if residual else ''}",
        func=_dense(m, n, k, weight.dtype, residual),
        packings={1: Packing(f"dense_{kind}", spec, _pack_dense)},
    )


EXACT = [f"quern.linear_exact{affine}{tail}" for affine in ("", "_offset", "_table") for tail in ("", "_residual")]
LOWERS = {
    **dict.fromkeys(EXACT, lower_exact),
    "quern.linear_dense": lower_dense,
    "quern.linear_dense_residual": lower_dense,
}
