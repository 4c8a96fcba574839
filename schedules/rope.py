"""Rotary position embedding of q and k, and the append of k and v to the cache.

  quern.rope_append  qkv f32[m, (heads + 2 * kv_heads) * d], rope f32[context, d], span i32[2],
                     k_cache f16|f32[kv_heads, capacity/16, d, 16], v_cache f16|f32[kv_heads, capacity, d];
                     heads, kv_heads, head_dim -> q f32[m, heads * d]; both caches are updated in place

Position of row t: p = span[0] + t. rope[p] holds cos of d/2 angles, then their sines. Halves rotate as in GPT-NeoX:
    out[i] = x[i] cos[i] - x[i + d/2] sin[i];  out[i + d/2] = x[i + d/2] cos[i] + x[i] sin[i]
The k cache is cut into blocks of 16 tokens with the token innermost: schedules.attention reads 16 keys as one vector.
Rows t >= span[1] are padding: they reach neither cache, and their q is not written.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import vector
from schedules.kernel import Kernel, Request
from schedules.vector import LANES, Expr


def _rotated(qkv: Any, t: Expr, start: Expr, i: Expr, cos: Expr, sin: Expr, half: int, lanes: int) -> tuple[Expr, Expr]:
    """Elements i.. and i + d/2.. of the head that starts at column `start`, rotated."""
    first = vector.hold(vector.load(qkv, t, start + i, lanes=lanes), lanes)
    second = vector.hold(vector.load(qkv, t, start + half + i, lanes=lanes), lanes)
    return first * cos - second * sin, second * cos + first * sin


def _store_key(cache: Any, value: Expr, head: Expr, position: Expr, i: Expr, lanes: int) -> None:
    """Elements i.. of one key, converted as a vector and stored one by one: neighbours along d lie 16 apart."""
    key = vector.registers(1, lanes, str(cache.ty.dtype))
    vector.store(key, value, 0, 0, lanes=lanes)
    for j in range(lanes):
        T.buffer_store(cache, key[0, j], [head, position // LANES, i + j, position % LANES])


def lower(request: Request) -> Kernel:
    """A token's heads one after another, its angles loaded once a vector; tokens in parallel."""
    qkv_spec, rope_spec, _, k_spec, v_spec = request.args
    heads, kv_heads, d = (int(request.attrs[key]) for key in ("heads", "kv_heads", "head_dim"))
    (m, columns), half = qkv_spec.shape, d // 2
    context, capacity = rope_spec.shape[0], v_spec.shape[1]
    name = f"rope_append_{k_spec.dtype}_m{m}_h{heads}_kv{kv_heads}_d{d}_p{context}_c{capacity}"
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        qkv = T.arg("qkv", T.buffer((m, columns), "float32", layout=None))
        rope = T.arg("rope", T.buffer((context, d), "float32", layout=None))
        span = T.arg("span", T.buffer((2,), "int32", layout=None))
        keys = T.arg("k_cache", T.buffer(k_spec.shape, k_spec.dtype, layout=None))
        values = T.arg("v_cache", T.buffer(v_spec.shape, v_spec.dtype, layout=None))
        out = T.arg("q", T.buffer((m, heads * d), "float32", layout=None))
        with T.sblock("rope_append"):
            T.reads(qkv[0:m, 0:columns], rope[0:context, 0:d], span[0:2])
            T.writes(
                keys[0:kv_heads, 0 : k_spec.shape[1], 0:d, 0:LANES],
                values[0:kv_heads, 0:capacity, 0:d],
                out[0:m, 0 : heads * d],
            )
            with vector.tokens(m) as t, T.If(t < span[1]), T.Then():
                position = vector.hold(span[0] + t, 1, "int32")

                def rotate(i: Expr, lanes: int) -> None:
                    cos = vector.hold(vector.load(rope, position, i, lanes=lanes), lanes)
                    sin = vector.hold(vector.load(rope, position, half + i, lanes=lanes), lanes)
                    with T.serial(heads) as h:
                        low, high = _rotated(qkv, t, h * d, i, cos, sin, half, lanes)
                        vector.store(out, low, t, h * d + i, lanes=lanes)
                        vector.store(out, high, t, h * d + half + i, lanes=lanes)
                    with T.serial(kv_heads) as h:
                        low, high = _rotated(qkv, t, (heads + h) * d, i, cos, sin, half, lanes)
                        _store_key(keys, low, h, position, i, lanes)
                        _store_key(keys, high, h, position, half + i, lanes)

                def copy(i: Expr, lanes: int) -> None:
                    value = vector.load(qkv, t, (heads + kv_heads + h) * d + i, lanes=lanes)
                    vector.store(values, value, h, position, i, lanes=lanes)

                vector.sweep(half, rotate)
                with T.serial(kv_heads) as h:
                    vector.sweep(d, copy)
    return Kernel(name, builder.get())


LOWERS = {"quern.rope_append": lower}
