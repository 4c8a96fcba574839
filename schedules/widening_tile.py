"""A tile of NEON's widening multiplications: four rows of codes times up to four tokens, into fp32.

Four rows go side by side, one vector each (schedules.packed_rows). SMULL and SMLAL multiply 8 codes by 8 activations
and add to 8 int16 sums (schedules.widening_sums), which are scaled where a span ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import lcm
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from schedules import filled_bytes, vector
from schedules.geometry import Geometry
from schedules.isa import broadcast_table
from schedules.packed_rows import BYTES, MIDDLE, ROWS, inputs_of
from schedules.packed_rows import steps as steps_of
from schedules.storage import Storage, Table, unpack
from schedules.vector import Expr
from schedules.widening_sums import HALF, Sum, most_products, rows_together

UNROLLED = 64  # inputs of a loop's body at least; from 128 on LLVM moves loads up until registers run out
LINE = ROWS * BYTES  # bytes: a vector of each of the rows is a cache line of a Cortex-A72


@dataclass(frozen=True)
class Layer:
    """What the kernel is for, and its tile."""

    m: int
    n: int
    geometry: Geometry
    storage: Storage
    scale_dtype: str
    affine: str
    residual: bool
    table: Table | None
    unit: float
    tokens: int = 1
    unroll: int = UNROLLED
    prefetch_bytes: int = 0

    @property
    def most(self) -> int:
        """Products that one int16 sum holds."""
        top = (1 << self.storage.bits) - 1
        largest = max(map(abs, self.table)) if self.table else MIDDLE if self.storage.bits == 8 else top
        return most_products(largest)

    @property
    def body(self) -> int:
        """Inputs of a loop's body: whole spans and whole steps, and `unroll` of them as far as that is more."""
        period = lcm(self.geometry.width, inputs_of(self.storage))
        while 2 * period <= self.unroll:
            period *= 2
        return period

    @property
    def inputs(self) -> int:
        """Stored inputs, spans and their padding."""
        return self.geometry.spans * self.geometry.width


class _Factors:
    """What `spans` spans from `first` on are scaled with, loaded up to four spans at a time."""

    def __init__(self, tile: Tile, first: Expr, spans: int):
        self._tile, self._first = tile, first
        self._at_once = next(count for count in (4, 2, 1) if spans % count == 0)
        self._loaded: dict[tuple[str, int, int], Expr] = {}

    def zero(self, s: int) -> Expr:
        """int16 vector [4] of the rows' zero points."""
        if self._tile.layer.affine == "one_zero":
            return T.broadcast(T.Cast("int16", self._tile.buffers["zero"][0]), ROWS)
        return self._of_rows("zero", s, "int16")

    @property
    def by_scalars(self) -> bool:
        """Whether the one zero point is multiplied outside of the vectors.

        By count that is worse only where one token's sums of activations come as a vector, whose lanes must be moved
        first: 0.345 and 0.322 instructions (groups of 32).
        """
        layer = self._tile.layer
        return layer.affine == "one_zero" and (self._at_once == 1 or layer.tokens > 1)

    def scale(self, s: int) -> Expr:
        """fp32 vector [4]."""
        return self._of_rows("scale", s, "float32")

    def offset(self, s: int) -> Expr:
        """fp32 vector [4]."""
        return self._of_rows("offset", s, "float32")

    def asum(self, t: int, s: int) -> Expr:
        """int32 of a token."""
        return self._of_token("asum", t, s, "int32")

    def ascale(self, t: int, s: int) -> Expr:
        """fp32 of a token."""
        return self._of_token("ascale", t, s, "float32")

    def _of_rows(self, name: str, s: int, dtype: str) -> Expr:
        start, place = s // self._at_once * self._at_once, s % self._at_once
        key, lanes = (name, start, 0), ROWS * self._at_once
        if key not in self._loaded:
            raw = self._tile.buffers[name][self._tile.block, self._first + start, T.ramp(0, 1, lanes)]
            self._loaded[key] = vector.hold(T.Cast(f"{dtype}x{lanes}", raw), lanes, dtype)
        return _part(self._loaded[key], place, self._at_once, dtype)

    def _of_token(self, name: str, t: int, s: int, dtype: str) -> Expr:
        token, start = self._tile.first + t, s // self._at_once * self._at_once
        if self._at_once == 1:
            return self._tile.buffers[name][token, self._first + s]
        key = (name, start, t)
        if key not in self._loaded:
            values = self._tile.buffers[name][token, T.ramp(self._first + start, 1, self._at_once)]
            self._loaded[key] = vector.hold(values, self._at_once, dtype)
        return tirx.Shuffle([self._loaded[key]], [s - start])


def _part(value: Expr, place: int, parts: int, dtype: str) -> Expr:
    """The place-th of `parts` (1, 2 or 4) vectors of four lanes."""
    while parts > 1:
        parts //= 2
        half = T.vectorhigh if place >= parts else T.vectorlow
        value, place = half(f"{dtype}x{ROWS * parts}", value), place % parts
    return value


@dataclass
class Tile:
    """Emits four rows of `tokens` tokens."""

    layer: Layer
    buffers: dict[str, Any]
    block: Expr
    first: Expr
    acc: list[Any] = field(default_factory=list)

    def emit(self) -> None:
        """A loop over equal stretches of spans, and what is left over."""
        layer = self.layer
        self.acc = [vector.registers(1, ROWS) for _ in range(layer.tokens)]
        for cell in self.acc:
            vector.store(cell, vector.splat(0.0, ROWS), 0, 0, lanes=ROWS)
        width, step_inputs = layer.geometry.width, inputs_of(layer.storage)
        period = layer.body
        whole = layer.inputs // period
        if whole:
            with T.serial(whole) as i:
                self._stretch(i * (period // step_inputs), i * (period // width), period)
        if rest := layer.inputs - whole * period:
            self._stretch(whole * (period // step_inputs), whole * (period // width), rest)
        for t in range(layer.tokens):
            self._store(t)

    def _stretch(self, step: Expr, span: Expr, inputs: int) -> None:
        """`inputs` stored inputs from the start of both a step and a span on: whole spans, all of it unrolled."""
        layer, width = self.layer, self.layer.geometry.width
        factors = _Factors(self, span, inputs // width)
        sums = [[Sum(layer.most) for _ in range(ROWS)] for _ in range(layer.tokens)]
        for at in range(0, inputs, BYTES):
            local, place = divmod(at, inputs_of(layer.storage))
            if place == 0:
                planes = range(layer.storage.vectors)
                if layer.prefetch_bytes:
                    self._prefetch(step + local)
                rows = [[self._weights(step + local, v, r) for v in planes] for r in range(ROWS)]
                fields = [self._fields(vectors) for vectors in rows]
            codes = [self._signed(of_row[place // BYTES]) for of_row in fields]
            # Ahead of the sums that end here: behind them several tokens' products would take the multiplier's pipe at
            # once (0.1306 cycles instead of 0.1296). For one token it is the other way round (0.1289 and 0.1299).
            ends = range(at // width, (at + BYTES) // width) if layer.tokens > 1 else range(0)
            ahead = {
                (s, t): vector.hold(self._scales(t, factors, s), ROWS) for s in ends for t in range(layer.tokens)
            }
            for half, x in self._halves(span, at, inputs):
                part = T.vectorhigh if half else T.vectorlow
                for t, r in product(range(layer.tokens), range(ROWS)):
                    sums[t][r].add(part("int8x8", codes[r]), x[t])
                s, end = divmod(at + half + HALF, width)
                if end == 0:
                    for t in range(layer.tokens):
                        self._scale(t, factors, s - 1, sums[t], ahead.get((s - 1, t)))
                        sums[t] = [Sum(layer.most) for _ in range(ROWS)]

    def _halves(self, span: Expr, at: int, inputs: int) -> Iterator[tuple[int, list[Expr]]]:
        """(0 or 8, int8 vectors [8] of every token) of up to sixteen activations; loaded at once within a span."""
        tokens = range(self.layer.tokens)
        if at // self.layer.geometry.width == (at + HALF) // self.layer.geometry.width:
            both = [self._activations(t, span, at, BYTES) for t in tokens]
            yield 0, [T.vectorlow("int8x8", x) for x in both]
            yield HALF, [T.vectorhigh("int8x8", x) for x in both]
            return
        for half in range(0, min(BYTES, inputs - at), HALF):
            yield half, [self._activations(t, span, at + half, HALF) for t in tokens]

    def _fields(self, vectors: list[Expr]) -> list[Expr]:
        """uint8 vectors [16] of a row's codes, out of a step's vectors."""
        storage = self.layer.storage
        if storage.high:
            return filled_bytes.unpack(storage.bits, vectors)
        return unpack(storage, vectors, ROWS, shifts_bytes=True)

    def _prefetch(self, step: Expr) -> None:
        """Ask for the codes that lie prefetch_bytes behind those of this step: a thread reads them front to back."""
        steps, vectors = steps_of(self.layer.geometry, self.layer.storage), self.layer.storage.vectors
        here = (self.block * steps + step) * (vectors * LINE)
        for v in range(vectors):
            vector.prefetch(self.buffers["codes"], here + (self.layer.prefetch_bytes + v * LINE))

    def _weights(self, step: Expr, v: int, row: int) -> Expr:
        return vector.hold(self.buffers["codes"][self.block, step, v, row, T.ramp(0, 1, BYTES)], BYTES, "uint8")

    def _signed(self, codes: Expr) -> Expr:
        """int8 vector [16] of codes, which fit, or their levels."""
        if self.layer.table is None:
            return vector.hold(T.reinterpret("int8x16", codes), BYTES, "int8")
        table = broadcast_table(self.layer.table, ROWS)
        return vector.hold(T.call_llvm_pure_intrin("int8x16", "llvm.aarch64.neon.tbl1", table, codes), BYTES, "int8")

    def _activations(self, t: int, span: Expr, at: int, lanes: int) -> Expr:
        s, o = divmod(at, self.layer.geometry.width)
        return vector.hold(self.buffers["q"][self.first + t, span + s, T.ramp(o, 1, lanes)], lanes, "int8")

    def _scales(self, t: int, factors: _Factors, s: int) -> Expr:
        """fp32 vector [4] of the rows' scales times the token's."""
        by_token = factors.ascale(t, s)
        if self.layer.table is not None:
            by_token = by_token * T.float32(self.layer.unit)
        return factors.scale(s) * T.broadcast(by_token, ROWS)

    def _scale(self, t: int, factors: _Factors, s: int, sums: list[Sum], scales: Expr | None) -> None:
        """Bring four rows' sums into one vector, scale them and add them to the token's fp32 results."""
        layer, centred = self.layer, rows_together(sums)
        if factors.by_scalars:  # their multiplier idles
            centred = centred - T.broadcast(factors.asum(t, s) * T.Cast("int32", self.buffers["zero"][0]), ROWS)
        elif "zero" in layer.affine:
            # |asum| <= 127 * 128 fits in 16 bits, and SMLSL takes half as long as MLS of 32 bits.
            asum = T.broadcast(T.Cast("int16", factors.asum(t, s)), ROWS)
            centred = centred - T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.smull", factors.zero(s), asum)
        elif layer.storage.bits == 8:
            centred = centred + T.broadcast(factors.asum(t, s) * MIDDLE, ROWS)
        value = T.Cast("float32x4", centred) * (self._scales(t, factors, s) if scales is None else scales)
        if layer.affine == "offset":
            weight = T.Cast("float32", factors.asum(t, s)) * factors.ascale(t, s)
            value = value + factors.offset(s) * T.broadcast(weight, ROWS)
        cell = self.acc[t]
        vector.store(cell, vector.load(cell, 0, 0, lanes=ROWS) + value, 0, 0, lanes=ROWS)

    def _store(self, t: int) -> None:
        """The rows that there are, plus the residual."""
        n, token, row = self.layer.n, self.first + t, self.block * ROWS

        def put(offset: int, lanes: int) -> None:
            value = self.acc[t][0, vector.at(offset, lanes)]
            if self.layer.residual:
                value = self.buffers["residual"][token, vector.at(row + offset, lanes)] + value
            T.buffer_store(self.buffers["out"], value, [token, vector.at(row + offset, lanes)])

        if n % ROWS == 0:
            put(0, ROWS)
            return
        with T.If(self.block < n // ROWS):
            with T.Then():
                put(0, ROWS)
            with T.Else():
                for i in range(n % ROWS):
                    put(i, 1)
