"""Rotary position embedding of q and k, and the append of k and v to the cache.

  quern.rope_append  qkv f32[m, (heads + 2 * kv_heads) * d], rope f32[context, d], span i32[2],
                     k_cache f16|f32[kv_heads, capacity/16, d, 16], v_cache f16|f32[kv_heads, capacity, d];
                     heads, kv_heads, head_dim -> q f32[m, heads * d]; both caches are updated in place
  quern.rope_append_int8  the same with caches i8[kv_heads, capacity/16, d/2, 32], i8[kv_heads, capacity/2, 2 * dp] and
                     after them k_scale, v_scale f32[kv_heads, capacity] (schedules.attention_int8 has the layout)
  quern.rope_append_norm[_int8]  the same with q_norm, k_norm after span, and eps: q and k are RMS-normed first. Where a
                     norm's weight has d values, each head is normed by itself; else all of them together.

Position of row t: p = span[0] + t. rope[p] holds cos of d/2 angles, then their sines. Halves rotate as in GPT-NeoX:
    out[i] = x[i] cos[i] - x[i + d/2] sin[i];  out[i + d/2] = x[i + d/2] cos[i] + x[i] sin[i]
The k cache is cut into blocks of 16 tokens with the token innermost: schedules.attention reads 16 keys as one vector.
An int8 cache takes scale = max |x| / 127 over a head's d elements and codes round_half_even(x * (127 / max |x|)), as
schedules.quantize does; 0 and scale 0 below its SMALLEST.
Rows t >= span[1] are padding: they reach neither cache, and their q is not written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import quantize, rms_norm, vector
from schedules.kernel import Kernel, Request, TensorSpec, spelled
from schedules.vector import LANES, Expr

Angles = Callable[[Expr, int], tuple[Expr, Expr]]  # (first pair, lanes) -> cosines, sines
Value = Callable[[Expr, Expr, int], Expr]  # (head, first element, lanes) -> fp32 vector


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


class Cache:
    """Keys and values as numbers: k f16|f32[kv_heads, capacity/16, d, 16], v [kv_heads, capacity, d]."""

    def __init__(self, specs: Sequence[TensorSpec], kv_heads: int, d: int):
        self.kv_heads, self.d = kv_heads, d
        names = ("k_cache", "v_cache", "k_scale", "v_scale")
        self.buffers = [T.arg(n, T.buffer(s.shape, s.dtype, layout=None)) for n, s in zip(names, specs, strict=False)]
        whole = [tuple(slice(0, n) for n in spec.shape) for spec in specs]
        self.regions = [buffer[region] for buffer, region in zip(self.buffers, whole, strict=True)]

    def append(self, fresh: Heads, value: Value, position: Expr, angles: Angles) -> None:
        """All heads of one token; value(head, i, lanes) gives elements of its values."""
        keys, values = self.buffers
        half = self.d // 2

        def rotate(i: Expr, lanes: int) -> None:
            cos, sin = angles(i, lanes)
            with T.serial(self.kv_heads) as h:
                low, high = fresh.rotated(h, i, cos, sin, lanes)
                for start, part in ((i, low), (half + i, high)):
                    # Converted as a vector and stored one by one: neighbours along d lie 16 apart.
                    key = vector.registers(1, lanes, str(keys.ty.dtype))
                    vector.store(key, part, 0, 0, lanes=lanes)
                    for j in range(lanes):
                        T.buffer_store(keys, key[0, j], [h, position // LANES, start + j, position % LANES])

        vector.sweep(half, rotate)
        with T.serial(self.kv_heads) as h:
            vector.sweep(
                self.d,
                lambda i, lanes: vector.store(values, value(h, i, lanes), h, position, i, lanes=lanes),
            )


class Int8Cache(Cache):
    """Keys and values as codes: k i8[kv_heads, capacity/16, d/2, 32], v i8[kv_heads, capacity/2, 2 dp], two scales."""

    def append(self, fresh: Heads, value: Value, position: Expr, angles: Angles) -> None:
        """As Cache, a head at a time: its largest element decides on all codes."""
        keys, values, *scales = self.buffers
        row = T.alloc_buffer((1, self.d), "float32", layout=None)
        codes = T.alloc_buffer((1, self.d), "int8", layout=None)
        half = self.d // 2
        with T.serial(self.kv_heads) as h:

            def rotate(i: Expr, lanes: int) -> None:
                low, high = fresh.rotated(h, i, *angles(i, lanes), lanes)
                vector.store(row, low, 0, i, lanes=lanes)
                vector.store(row, high, 0, half + i, lanes=lanes)

            vector.sweep(half, rotate)
            self._quantize(row, codes, scales[0], h, position)
            with T.serial(half) as i:
                pair = T.ramp(position % LANES * 2, 1, 2)
                T.buffer_store(keys, codes[0, T.ramp(2 * i, 1, 2)], [h, position // LANES, i, pair])
            vector.sweep(self.d, lambda i, lanes: vector.store(row, value(h, i, lanes), 0, i, lanes=lanes))
            self._quantize(row, codes, scales[1], h, position)
            with T.serial(self.d) as i:
                T.buffer_store(values, codes[0, i], [h, position // 2, 2 * i + position % 2])

    def _quantize(self, row: Any, codes: Any, scale: Any, h: Expr, position: Expr) -> None:
        """row f32[1, d] to codes i8[1, d], and scale[h, position]."""
        largest = vector.registers(1, 1)
        T.buffer_store(largest, T.float32(0), [0, 0])

        def measure(i: Expr, lanes: int) -> None:
            most = vector.largest(vector.absolute(vector.load(row, 0, i, lanes=lanes), lanes), lanes)
            T.buffer_store(largest, T.max(largest[0, 0], most), [0, 0])

        vector.sweep(self.d, measure)
        some = largest[0, 0] >= T.float32(quantize.SMALLEST)
        T.buffer_store(scale, T.Select(some, largest[0, 0] / T.float32(127), T.float32(0)), [h, position])
        inverse = vector.hold(T.Select(some, T.float32(127) / largest[0, 0], T.float32(0)), 1)

        def convert(i: Expr, lanes: int) -> None:
            scaled = vector.load(row, 0, i, lanes=lanes) * vector.splat(inverse, lanes)
            vector.store(codes, vector.to_int32(scaled, lanes), 0, i, lanes=lanes)

        vector.sweep(self.d, convert)


def lower(request: Request) -> Kernel:
    """A token's heads one after another; tokens in parallel."""
    qkv_spec, rope_spec, _, *others = request.args
    norm_specs, cache_specs = (others[:2], others[2:]) if "_norm" in request.op else ([], others)
    heads, kv_heads, d = (int(request.attrs[key]) for key in ("heads", "kv_heads", "head_dim"))
    (m, columns), half = qkv_spec.shape, d // 2
    kind, context = cache_specs[0].dtype, rope_spec.shape[0]
    capacity = cache_specs[2 if kind == "int8" else 1].shape[1]
    eps = float(request.attrs.get("eps", 0.0))
    name = f"rope_append_{kind}_m{m}_h{heads}_kv{kv_heads}_d{d}_p{context}_c{capacity}"
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
        cache = (Int8Cache if kind == "int8" else Cache)(cache_specs, kv_heads, d)
        out = T.arg("q", T.buffer((m, heads * d), "float32", layout=None))
        with T.sblock("rope_append"):
            T.reads(qkv[0:m, 0:columns], rope[0:context, 0:d], span[0:2], *(norm[0 : norm.shape[0]] for norm in norms))
            T.writes(*cache.regions, out[0:m, 0 : heads * d])
            with vector.tokens(m) as t, T.If(t < span[1]), T.Then():
                position = vector.hold(span[0] + t, 1, "int32")
                q_norm, k_norm = norms or (None, None)
                queries = Heads(qkv, t, d, 0, heads, q_norm, eps)
                fresh = Heads(qkv, t, d, heads, kv_heads, k_norm, eps)

                def angles(i: Expr, lanes: int) -> tuple[Expr, Expr]:
                    cos = vector.hold(vector.load(rope, position, i, lanes=lanes), lanes)
                    return cos, vector.hold(vector.load(rope, position, half + i, lanes=lanes), lanes)

                def rotate(i: Expr, lanes: int) -> None:
                    cos, sin = angles(i, lanes)
                    with T.serial(heads) as h:
                        low, high = queries.rotated(h, i, cos, sin, lanes)
                        vector.store(out, low, t, h * d + i, lanes=lanes)
                        vector.store(out, high, t, h * d + half + i, lanes=lanes)

                def value(h: Expr, i: Expr, lanes: int) -> Expr:
                    return vector.load(qkv, t, (heads + kv_heads + h) * d + i, lanes=lanes)

                vector.sweep(half, rotate)
                cache.append(fresh, value, position, angles)
    return Kernel(name, builder.get())


LOWERS = {f"quern.rope_append{norm}{kind}": lower for norm in ("", "_norm") for kind in ("", "_int8")}
