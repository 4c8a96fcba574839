"""Rotary position embedding of q and k, and the append of k and v to the cache.

  quern.rope_append  qkv f32[m, (heads + 2 * kv_heads) * d], rope f32[context, d], span i32[2],
                     k_cache f16|f32[kv_heads, capacity/16, d, 16], v_cache f16|f32[kv_heads, capacity, d];
                     heads, kv_heads, head_dim -> q f32[m, heads * d]; both caches are updated in place
  quern.rope_append_norm  the same with q_norm, k_norm after span, and eps: q and k are RMS-normed first. Where a norm's
                     weight has d values, each head is normed by itself; else all of them together.

Position of row t: p = span[0] + t. rope[p] holds cos of d/2 angles, then their sines. Halves rotate as in GPT-NeoX:
    out[i] = x[i] cos[i] - x[i + d/2] sin[i];  out[i + d/2] = x[i + d/2] cos[i] + x[i] sin[i]
The k cache is cut into blocks of 16 tokens with the token innermost: schedules.attention reads 16 keys as one vector.
Rows t >= span[1] are padding: they reach neither cache, and their q is not written.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import rms_norm, vector
from schedules.kernel import Kernel, Request, spelled
from schedules.vector import LANES, Expr


class Heads:
    """`count` heads of one token, the first at column `first * d` of qkv; with a norm's weight they are normed."""

    def __init__(self, qkv: Any, t: Expr, d: int, first: int, count: int, weight: Any = None, eps: float = 0.0):
        self.qkv, self.t, self.d, self.first, self.count, self.weight = qkv, t, d, first, count, weight
        if weight is None:
            return
        self.each = weight.shape[0] == d  # one norm a head
        self.factors = T.alloc_buffer((1, count if self.each else 1), "float32", layout=None)
        with T.serial(count if self.each else 1) as h:
            width = d if self.each else count * d
            factor = rms_norm.inverse_rms(qkv, t, width, eps, (first + h) * d)
            T.buffer_store(self.factors, factor, [0, h])

    def load(self, h: Expr, i: Expr, lanes: int) -> Expr:
        """Elements i.. of head h."""
        value = vector.load(self.qkv, self.t, (self.first + h) * self.d + i, lanes=lanes)
        if self.weight is not None:
            factor = vector.splat(self.factors[0, h if self.each else 0], lanes)
            value = value * factor * vector.load(self.weight, i if self.each else h * self.d + i, lanes=lanes)
        return vector.hold(value, lanes)

    def rotated(self, h: Expr, i: Expr, cos: Expr, sin: Expr, lanes: int) -> tuple[Expr, Expr]:
        """Elements i.. and i + d/2.. of head h, rotated."""
        first, second = self.load(h, i, lanes), self.load(h, self.d // 2 + i, lanes)
        return first * cos - second * sin, second * cos + first * sin


def _store_key(cache: Any, value: Expr, head: Expr, position: Expr, i: Expr, lanes: int) -> None:
    """Elements i.. of one key, converted as a vector and stored one by one: neighbours along d lie 16 apart."""
    key = vector.registers(1, lanes, str(cache.ty.dtype))
    vector.store(key, value, 0, 0, lanes=lanes)
    for j in range(lanes):
        T.buffer_store(cache, key[0, j], [head, position // LANES, i + j, position % LANES])


def lower(request: Request) -> Kernel:
    """A token's heads one after another, its angles loaded once a vector; tokens in parallel."""
    qkv_spec, rope_spec, _, *norm_specs, k_spec, v_spec = request.args
    heads, kv_heads, d = (int(request.attrs[key]) for key in ("heads", "kv_heads", "head_dim"))
    (m, columns), half = qkv_spec.shape, d // 2
    context, capacity = rope_spec.shape[0], v_spec.shape[1]
    eps = float(request.attrs.get("eps", 0.0))
    name = f"rope_append_{k_spec.dtype}_m{m}_h{heads}_kv{kv_heads}_d{d}_p{context}_c{capacity}"
    if norm_specs:
        name += f"_norm{norm_specs[0].shape[0]}_{norm_specs[1].shape[0]}_eps{spelled(eps)}"
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        qkv = T.arg("qkv", T.buffer((m, columns), "float32", layout=None))
        rope = T.arg("rope", T.buffer((context, d), "float32", layout=None))
        span = T.arg("span", T.buffer((2,), "int32", layout=None))
        norms = [
            T.arg(f"{side}_norm", T.buffer(norm.shape, "float32", layout=None))
            for side, norm in zip("qk", norm_specs, strict=False)
        ]
        keys = T.arg("k_cache", T.buffer(k_spec.shape, k_spec.dtype, layout=None))
        values = T.arg("v_cache", T.buffer(v_spec.shape, v_spec.dtype, layout=None))
        out = T.arg("q", T.buffer((m, heads * d), "float32", layout=None))
        with T.sblock("rope_append"):
            T.reads(qkv[0:m, 0:columns], rope[0:context, 0:d], span[0:2], *(norm[0 : norm.shape[0]] for norm in norms))
            T.writes(
                keys[0:kv_heads, 0 : k_spec.shape[1], 0:d, 0:LANES],
                values[0:kv_heads, 0:capacity, 0:d],
                out[0:m, 0 : heads * d],
            )
            with vector.tokens(m) as t, T.If(t < span[1]), T.Then():
                position = vector.hold(span[0] + t, 1, "int32")
                q_norm, k_norm = norms or (None, None)
                queries = Heads(qkv, t, d, 0, heads, q_norm, eps)
                fresh = Heads(qkv, t, d, heads, kv_heads, k_norm, eps)

                def rotate(i: Expr, lanes: int) -> None:
                    cos = vector.hold(vector.load(rope, position, i, lanes=lanes), lanes)
                    sin = vector.hold(vector.load(rope, position, half + i, lanes=lanes), lanes)
                    with T.serial(heads) as h:
                        low, high = queries.rotated(h, i, cos, sin, lanes)
                        vector.store(out, low, t, h * d + i, lanes=lanes)
                        vector.store(out, high, t, h * d + half + i, lanes=lanes)
                    with T.serial(kv_heads) as h:
                        low, high = fresh.rotated(h, i, cos, sin, lanes)
                        _store_key(keys, low, h, position, i, lanes)
                        _store_key(keys, high, h, position, half + i, lanes)

                def copy(i: Expr, lanes: int) -> None:
                    value = vector.load(qkv, t, (heads + kv_heads + h) * d + i, lanes=lanes)
                    vector.store(values, value, h, position, i, lanes=lanes)

                vector.sweep(half, rotate)
                with T.serial(kv_heads) as h:
                    vector.sweep(d, copy)
    return Kernel(name, builder.get())


LOWERS = {"quern.rope_append": lower, "quern.rope_append_norm": lower}
