"""Integer linear layers for NEON without dot products (Cortex-A72, A53): bytes multiplied into 16-bit sums.

The operators and the arithmetic are those of schedules.linear_int8, which see; integers are exact and fp32 operations
come in the same order. Four rows go side by side, one vector each (schedules.packed_rows). SMULL and SMLAL multiply 8
codes by 8 activations and add to 8 int16 sums; SADDLP and ADDP bring a span's sums together, a lane for each row, and
from there on a vector holds four rows.

No int16 sum overflows: |activation| <= 127, so MOST products of one size fit before SADALP moves them to int32,
MOST = 32767 // (127 * largest |code|):
    bits 2: 86    3: 36    4: 17    5: 8    6: 4    8: 2 (codes minus 128: 2 * 128 * 127 = 32512)    levels: 2 (32258)
A lane gets one product for 8 inputs, at most 16 in a span of 128: 4-bit codes need no SADALP. An int32 holds
128 * 255 * 127 and twice that with the zero point. -128 never occurs among activations.

Cortex-A72: one multiplication of 8 bytes a cycle and no more, so 0.125 cycles a product is the floor; the rest must fit
beside it. Tiles of four rows and two tokens share a row's unpacked codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import lcm
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import vector
from schedules.geometry import Geometry
from schedules.isa import broadcast_table
from schedules.kernel import Kernel, NotSuited, Request
from schedules.linear_int8 import CODES, SCALE, int8_levels
from schedules.packed import affine_of
from schedules.packed_rows import BYTES, MIDDLE, ROWS, blocks, inputs_of, storage_of, weight_packings
from schedules.packed_rows import steps as steps_of
from schedules.storage import Storage, Table
from schedules.vector import Expr

RANK = 10
HALF = 8  # int16 sums in a register, products of one instruction
QMAX = 127


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
    tokens: int

    @property
    def most(self) -> int:
        """Products that one int16 sum holds."""
        largest = max(map(abs, self.table)) if self.table else MIDDLE if self.storage.bits == 8 else self._top
        return 32767 // (QMAX * largest)

    @property
    def _top(self) -> int:
        return (1 << self.storage.bits) - 1

    @property
    def inputs(self) -> int:
        """Stored inputs, spans and their padding."""
        return self.geometry.spans * self.geometry.width


@dataclass
class _Sum:
    """A row's sum over one span and token so far: a chain of int16 products, and int32 of those that were moved."""

    short: Expr = None
    products: int = 0
    long: Expr = None

    def add(self, code: Expr, activation: Expr, most: int) -> None:
        if self.products == most:
            self._move()
        product = T.Cast("int16x8", code) * T.Cast("int16x8", activation)
        self.short = product if self.short is None else self.short + product
        self.products += 1

    def _move(self) -> None:
        pairs = T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp", self.short)
        self.long = vector.hold(pairs if self.long is None else self.long + pairs, 4, "int32")
        self.short, self.products = None, 0

    def total(self) -> Expr:
        """int32 vector [4]; its lanes' sum is the row's."""
        self._move()
        return self.long


@dataclass
class _Tile:
    """Emits four rows of `tokens` tokens."""

    layer: Layer
    buffers: dict[str, Any]
    block: Expr
    first: Expr
    acc: list[Any] = field(default_factory=list)

    def emit(self) -> None:
        layer = self.layer
        self.acc = [vector.registers(1, ROWS) for _ in range(layer.tokens)]
        for cell in self.acc:
            vector.store(cell, vector.splat(0.0, ROWS), 0, 0, lanes=ROWS)
        width, step_inputs = layer.geometry.width, inputs_of(layer.storage)
        period = lcm(width, step_inputs)
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
        sums = [[_Sum() for _ in range(ROWS)] for _ in range(layer.tokens)]
        for at in range(0, inputs, BYTES):
            local, place = divmod(at, inputs_of(layer.storage))
            if place == 0:
                vectors = [[self._weights(step + local, v, r) for r in range(ROWS)] for v in range(layer.storage.vectors)]
            codes = [self._codes([vectors[v][r] for v in range(layer.storage.vectors)], place // BYTES) for r in range(ROWS)]
            together = at // width == (at + HALF) // width
            for half in range(0, min(BYTES, inputs - at), HALF):
                if half == 0 and together:
                    both = [self._activations(t, span, at, BYTES) for t in range(layer.tokens)]
                    parts = [[part("int8x8", x) for part in (T.vectorlow, T.vectorhigh)] for x in both]
                for t in range(layer.tokens):
                    x = parts[t][half // HALF] if together else self._activations(t, span, at + half, HALF)
                    for r in range(ROWS):
                        part = T.vectorhigh if half else T.vectorlow
                        sums[t][r].add(part("int8x8", codes[r]), x, layer.most)
                if (at + half + HALF) % width == 0:
                    for t in range(layer.tokens):
                        self._scale(t, span + (at + half) // width, sums[t])
                        sums[t] = [_Sum() for _ in range(ROWS)]

    def _weights(self, step: Expr, v: int, row: int) -> Expr:
        return vector.hold(self.buffers["codes"][self.block, step, v, row, T.ramp(0, 1, BYTES)], BYTES, "uint8")

    def _codes(self, vectors: list[Expr], f: int) -> Expr:
        """int8 vector [16] of field f of a row's step: codes, or levels of a table."""
        storage = self.layer.storage
        per = storage.per_vector
        value = _field(vectors[f // per], f % per, storage.low)
        if storage.high:
            above = _field(vectors[-1], f, storage.high)
            value = T.bitwise_or(value, T.shift_left(above, T.broadcast(T.uint8(storage.low), BYTES)))
        if self.layer.table is not None:
            value = T.call_llvm_pure_intrin("int8x16", "llvm.aarch64.neon.tbl1", _register(self.layer.table), value)
            return vector.hold(value, BYTES, "int8")
        return vector.hold(T.reinterpret("int8x16", value), BYTES, "int8")

    def _activations(self, t: int, span: Expr, at: int, lanes: int) -> Expr:
        s, o = divmod(at, self.layer.geometry.width)
        return vector.hold(self.buffers["q"][self.first + t, span + s, T.ramp(o, 1, lanes)], lanes, "int8")

    def _scale(self, t: int, s: Expr, sums: list[_Sum]) -> None:
        """Bring four rows' sums into one vector, and add them to the token's fp32 results."""
        layer, token, lanes = self.layer, self.first + t, T.ramp(0, 1, ROWS)
        pairs = [sum_.total() for sum_ in sums]
        while len(pairs) > 1:
            pairs = [_add_pairs(a, b) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
        centred, asum = pairs[0], self.buffers["asum"][token, s]
        if layer.affine == "zero":
            zero = T.Cast("int32x4", self.buffers["zero"][self.block, s, lanes])
            centred = centred - zero * T.broadcast(asum, ROWS)
        elif layer.storage.bits == 8:
            centred = centred + T.broadcast(asum * MIDDLE, ROWS)
        by_token = self.buffers["ascale"][token, s]
        if layer.table is not None:
            by_token = by_token * T.float32(layer.unit)
        scale = T.Cast("float32x4", self.buffers["scale"][self.block, s, lanes])
        value = T.Cast("float32x4", centred) * (scale * T.broadcast(by_token, ROWS))
        if layer.affine == "offset":
            weight = T.Cast("float32", asum) * self.buffers["ascale"][token, s]
            value = value + self.buffers["offset"][self.block, s, lanes] * T.broadcast(weight, ROWS)
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


def _field(value: Expr, f: int, bits: int) -> Expr:
    """uint8 vector [16]: the f-th field of `bits` bits of every byte."""
    if f:
        value = T.shift_right(value, T.broadcast(T.uint8(f * bits), BYTES))
    if (f + 1) * bits < 8:
        value = T.bitwise_and(value, T.broadcast(T.uint8((1 << bits) - 1), BYTES))
    return value


def _register(table: Table) -> Expr:
    """Sixteen levels in one register."""
    return broadcast_table(table, ROWS)


def _add_pairs(a: Expr, b: Expr) -> Expr:
    """Sums of neighbours, those of a first."""
    return vector.hold(T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.addp", a, b), ROWS, "int32")


def kernel(layer: Layer, name: str) -> Any:
    """Blocks of four rows in parallel, then tiles of tokens."""
    m, n, geometry, storage = layer.m, layer.n, layer.geometry, layer.storage
    spans, width = geometry.spans, geometry.width
    groups = (blocks(n), spans, ROWS)
    shapes = {
        "q": ((m, spans, width), "int8"),
        "ascale": ((m, spans), "float32"),
        "asum": ((m, spans), "int32"),
        "codes": ((blocks(n), steps_of(geometry, storage), storage.vectors, ROWS, BYTES), "uint8"),
        "scale": (groups, layer.scale_dtype),
    }
    if layer.affine != "table":
        zero_dtype = "int8" if storage.bits == 8 else "uint8"
        shapes[layer.affine] = (groups, "float32" if layer.affine == "offset" else zero_dtype)
    if layer.residual:
        shapes["residual"] = ((m, n), "float32")
    shapes["out"] = ((m, n), "float32")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        buffers = {key: T.arg(key, T.buffer(shape, dtype, layout=None)) for key, (shape, dtype) in shapes.items()}
        with T.sblock("linear"):
            T.reads(*(_whole(b, shapes[key][0]) for key, b in buffers.items() if key != "out"))
            T.writes(_whole(buffers["out"], (m, n)))
            with T.parallel(blocks(n)) as block:
                if m == layer.tokens:
                    _Tile(layer, buffers, block, T.int32(0)).emit()
                else:
                    with T.serial(m // layer.tokens) as tile:
                        _Tile(layer, buffers, block, tile * layer.tokens).emit()
    return builder.get()


def _whole(buffer: Any, shape: tuple[int, ...]) -> Any:
    return buffer[tuple(slice(0, extent) for extent in shape)]


def lower(request: Request) -> Kernel:
    """For aarch64 with NEON and without dot products; other targets are not suited."""
    target = request.target
    if target.arch != "aarch64" or not target.has("neon") or target.has("dotprod"):
        raise NotSuited
    group, affine = int(request.attrs["group"]), affine_of(request.op)
    m, (n, k) = request.args[0].shape[0], request.args[CODES].shape
    geometry, storage = Geometry(k, group), storage_of(int(request.attrs["bits"]))
    table, unit = int8_levels(request.table) if request.table is not None else (None, 1.0)
    residual = request.op.endswith("_residual")
    scale_dtype = request.args[SCALE].dtype
    tokens = int(request.knobs.get("tokens", 2 if m % 2 == 0 else 1))
    layer = Layer(m, n, geometry, storage, scale_dtype, affine, residual, table, unit, tokens)
    kind = request.attrs.get("grid", storage.name)
    tail = ("_offset" if affine == "offset" else "") + ("_residual" if residual else "")
    name = f"linear_{kind}a8_widening_m{m}_n{n}_k{k}_g{group}_s{scale_dtype[5:]}{tail}"
    return Kernel(name, kernel(layer, name), weight_packings(CODES, n, geometry, storage, scale_dtype, affine))


LOWERS = {
    f"quern.linear_int8{affine}{tail}": lower for affine in ("", "_offset", "_table") for tail in ("", "_residual")
}
