"""fp32 activations to int8, one scale a span of at most 128 inputs (schedules.geometry).

  quern.quantize           x f32[m, k]; group -> q i8[m, spans, width], scale f32[m, spans], sum i32[m, spans]
  quern.quantize_permuted  x f32[m, k], permutation i32[k]; group -> the same of x[:, permutation]
  quern.gather             x f32[m, k], permutation i32[k] -> x[:, permutation] f32[m, k]

    amax = max |x| over the span;  scale = amax / 127;  q = round_half_even(x * (127 / amax));  sum = sum of q
All in fp32 with one rounding an operation, so the result equals numpy's float32 bit for bit on every ISA. |q| <= 127
holds without a clamp: |x| * (127 / amax) <= 127 * (1 + 2^-23). Padding is 0. A span with amax < SMALLEST becomes 0 with
scale 0, because 127 / amax would overflow. x must be finite.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from itertools import groupby
from operator import add, itemgetter
from typing import NamedTuple

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import vector
from schedules.geometry import Geometry
from schedules.kernel import Kernel, Request
from schedules.vector import Expr

Value = Callable[[Expr, int], Expr]  # (first element, lanes) -> fp32 vector
SMALLEST = 1e-36  # above 127 / largest finite fp32 = 3.73e-37


class Run(NamedTuple):
    """`spans` spans from number `first` on, all `length` inputs long; their inputs start at `start`, `stride` apart."""

    first: int
    spans: int
    start: int
    stride: int
    length: int


def runs(geometry: Geometry) -> list[Run]:
    """The spans as few loops with constant bounds: one when all are equally long."""
    lengths = (geometry.source >= 0).sum(1).tolist()
    starts = geometry.source[:, 0].tolist()
    found: list[Run] = []
    for length, members in groupby(range(geometry.spans), key=lengths.__getitem__):
        first, *rest = members
        found.append(Run(first, 1, starts[first], geometry.span, length))
        for s in rest:
            last = found[-1]
            stride = starts[s] - starts[s - 1]
            if last.spans == 1 or stride == last.stride:
                found[-1] = last._replace(spans=last.spans + 1, stride=stride)
            else:
                found.append(Run(s, 1, starts[s], geometry.span, length))
    return found


class Rows:
    """Output parameter of a kernel that makes rows of fp32 values: f32[m, k]."""

    def __init__(self, m: int, k: int):
        self.k = k
        self.out = T.arg("out", T.buffer((m, k), "float32", layout=None))
        self.regions = [self.out[0:m, 0:k]]

    def emit(self, t: Expr, value: Value) -> None:
        """Write row t, whose elements k..k+lanes-1 are value(k, lanes)."""
        vector.sweep(self.k, lambda k, lanes: vector.store(self.out, value(k, lanes), t, k, lanes=lanes))


class QuantizedRows:
    """Output parameters of a kernel that quantises the rows it makes: q, scale and sum."""

    def __init__(self, m: int, geometry: Geometry):
        self.geometry = geometry
        spans, width = geometry.spans, geometry.width
        self.q = T.arg("q", T.buffer((m, spans, width), "int8", layout=None))
        self.scale = T.arg("scale", T.buffer((m, spans), "float32", layout=None))
        self.sum = T.arg("sum", T.buffer((m, spans), "int32", layout=None))
        self.regions = [self.q[0:m, 0:spans, 0:width], self.scale[0:m, 0:spans], self.sum[0:m, 0:spans]]

    def emit(self, t: Expr, value: Value) -> None:
        """Quantise row t; each value is asked for once."""
        for run in runs(self.geometry):
            with T.serial(run.spans) as i:
                start = run.start + i * run.stride
                held = [
                    (o, lanes, vector.hold(value(start + o, lanes), lanes)) for o, lanes in vector.pieces(run.length)
                ]
                self._span(t, run.first + i, held)
                for o, lanes in vector.pieces(self.geometry.width - run.length):
                    zero = vector.splat(T.int32(0), lanes)
                    vector.store(self.q, zero, t, run.first + i, run.length + o, lanes=lanes)

    def _span(self, t: Expr, s: Expr, held: list[tuple[int, int, Expr]]) -> None:
        """One span from its (offset, lanes, values), all unrolled: between maximum and rounding it is all registers."""
        by_width = [(lanes, list(group)) for lanes, group in groupby(held, key=itemgetter(1))]
        bits: Expr = T.int32(0)  # of |x|, which rise as the numbers do; comparing integers takes an A72 a quarter
        for lanes, group in by_width:
            kind = vector.kind("int32", lanes)
            most = reduce(T.max, [T.reinterpret(kind, vector.absolute(x, lanes)) for _, _, x in group])
            bits = T.max(bits, vector.fold(most, lanes, T.max, "int32"))
        amax = vector.hold(T.reinterpret("float32", bits), 1)
        some = amax >= T.float32(SMALLEST)
        T.buffer_store(self.scale, T.Select(some, amax / T.float32(127), T.float32(0)), [t, s])
        inverse = vector.hold(T.Select(some, T.float32(127) / amax, T.float32(0)), 1)
        total: Expr = T.int32(0)
        for lanes, group in by_width:
            codes = []
            for o, _, x in group:
                codes.append(vector.hold(vector.to_int32(x * vector.splat(inverse, lanes), lanes), lanes, "int32"))
                vector.store(self.q, codes[-1], t, s, o, lanes=lanes)
            total = total + vector.total(reduce(add, codes), lanes, "int32")
        T.buffer_store(self.sum, total, [t, s])


def declare(m: int, k: int, group: int | None) -> Rows | QuantizedRows:
    """The output parameters of a kernel that makes rows of k values, quantised when there is a group."""
    return Rows(m, k) if group is None else QuantizedRows(m, Geometry(k, group))


class Order:
    """Parameter of a kernel that makes permuted rows: permutation i32[k]; place k of a row is input permutation[k]."""

    def __init__(self, k: int):
        self.permutation = T.arg("permutation", T.buffer((k,), "int32", layout=None))
        self.regions = [self.permutation[0:k]]

    def at(self, k: Expr, lanes: int) -> Expr:
        """Inputs of `lanes` places from k on."""
        return vector.hold(self.permutation[vector.at(k, lanes)], lanes, "int32")


class Straight:
    """Rows as they are: no parameter, place k is input k."""

    regions: tuple[Expr, ...] = ()

    def at(self, k: Expr, lanes: int) -> Expr:
        """Neighbours."""
        return vector.at(k, lanes)


def order(request: Request, k: int) -> Order | Straight:
    """The permutation parameter of *_permuted operators; it stands behind all other tensor arguments."""
    return Order(k) if request.op.endswith(("_permuted", ".gather")) else Straight()


def lower(request: Request) -> Kernel:
    """Tokens in parallel; the spans of a token one after another."""
    (m, k), group = request.args[0].shape, request.attrs.get("group")
    name = f"{request.op.partition('.')[2]}_m{m}_k{k}" + (f"_g{group}" if group else "")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        x = T.arg("x", T.buffer((m, k), "float32", layout=None))
        places = order(request, k)
        out = declare(m, k, int(group) if group else None)
        with T.sblock("quantize"):
            T.reads(x[0:m, 0:k], *places.regions)
            T.writes(*out.regions)
            with vector.tokens(m) as t:
                out.emit(t, lambda k, lanes: x[t, places.at(k, lanes)])
    return Kernel(name, builder.get())


LOWERS = {"quern.quantize": lower, "quern.quantize_permuted": lower, "quern.gather": lower}
