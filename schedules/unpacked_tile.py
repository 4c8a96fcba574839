"""A block of rows of packed codes times all tokens, codes unpacked once, for schedules.linear_int8_unpacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from schedules import storage as storages
from schedules import vector
from schedules.counted import marks, real_tiles
from schedules.geometry import MAX_SPAN, Geometry
from schedules.isa import ByQuads, broadcast_quad
from schedules.linear_function import ask_codes, zeros_of
from schedules.packed import blocks
from schedules.storage import LANES, QUAD, Storage, Table
from schedules.vector import Expr

BYTES = LANES * QUAD
NIBBLES = Storage(4)
FIRST, REST, ALONE = "first", "rest", "alone"
Cells = dict[tuple[int, int], Any]  # a vector for every token of a tile and every part of the block's rows


@dataclass(frozen=True)
class Layer:
    """What the kernel is for. unit: value of one level of `table`; x: blocks beside each other; ahead: bytes."""

    m: int
    n: int
    geometry: Geometry
    storage: Storage
    table: Table | None
    unit: float
    x: int
    ahead: int
    isa: ByQuads

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.isa.KNOBS["unpacked_tokens"]

    @property
    def parts(self) -> range:
        """A block's rows by registers of 32-bit lanes."""
        return range(LANES // self.isa.VECTOR)

    @property
    def steps(self) -> int:
        """Steps of a span."""
        return self.geometry.width // self.storage.inputs

    @property
    def held(self) -> int:
        """Quads whose products one sum holds."""
        if self.isa.PARTIAL == "int32":
            return MAX_SPAN // QUAD
        return self.isa.held(self.storage.bits // self.planes)

    @property
    def planes(self) -> int:
        """Passes that a code is multiplied in: one of 8 bits may need two, of 4 bits each."""
        return self.isa.BYTE_PLANES if self.storage.bits == 8 else 1

    @property
    def at_once(self) -> int:
        """Steps of a loop's body at most: as many as one sum holds, or some with several sums each."""
        quads, most = self.storage.quads, self.isa.KNOBS["unpacked_quads"]
        return max(1, (min(most, self.held) if self.held >= quads else most) // quads)

    @property
    def lines(self) -> int:
        """Lines that a span leaves: its quads, and the scales."""
        return self.steps * self.storage.quads * self.planes + 1

    def bytes_of(self, part: int) -> Any:
        """Where a part's bytes are in a line."""
        size = QUAD * self.isa.VECTOR
        return T.ramp(part * size, 1, size)


@dataclass
class Task:
    """Emits one block of rows with all tokens."""

    layer: Layer
    buffers: dict[str, Any]
    block: Expr
    unpacked: Any = field(init=False)

    def emit(self) -> None:
        """Either way, and the choice."""
        layer, tokens = self.layer, self.layer.tokens
        tiles = real_tiles(layer.m, tokens)

        def loop() -> Any:
            return T.serial(layer.m // tokens, annotations=marks(tokens))

        with T.If(tiles > layer.isa.KNOBS["unpacked_few"]):
            with T.Then():
                self.unpacked = T.alloc_buffer((layer.geometry.spans, layer.lines, BYTES), "uint8", layout=None)
                with loop() as tile, T.If(tile == 0):
                    with T.Then():
                        self._tile(tile, FIRST)
                    with T.Else():
                        self._tile(tile, REST)
            with T.Else(), loop() as tile:
                self._tile(tile, ALONE)

    def _tile(self, tile: Expr, kind: str) -> None:
        """All spans of a tile, and its output."""
        layer, lanes = self.layer, self.layer.isa.VECTOR
        first, row = tile * layer.tokens, self.block * LANES
        sums = self._cells("float32", lanes)
        for t in range(layer.tokens):
            for name in ("residual", "out"):
                if name in self.buffers and kind != ALONE:
                    vector.prefetch(self.buffers[name], (first + t) * layer.n + row, write=name == "out")
        with T.serial(layer.geometry.spans) as s:
            totals = self._cells("int32", lanes)
            self._multiply(tile, s, kind, totals)
            self._scale(first, s, kind, totals, sums)
        for (t, part), cell in sums.items():
            self._write(first + t, row + part * lanes, cell)

    def _cells(self, dtype: str, lanes: int) -> Cells:
        """Zeros."""
        places = list(product(range(self.layer.tokens), self.layer.parts))
        cells = {place: vector.registers(1, lanes, dtype) for place in places}
        for cell in cells.values():
            _clear(cell)
        return cells

    def _multiply(self, tile: Expr, s: Expr, kind: str, totals: Cells) -> None:
        """Integer sums of a span."""
        layer = self.layer
        if kind == REST:  # step `tile`, and those that no tile stands for, of this span in the next block
            for step in range(0, layer.steps, layer.m // layer.tokens):
                ask_codes(self.buffers["codes"], self.block + 1, s, T.min(tile + step, T.int32(layer.steps - 1)))
        at_once = min(layer.at_once, layer.steps)
        with T.serial(layer.steps // at_once) as i:
            self._stretch(tile, s, kind, totals, i * at_once, at_once)
        if rest := layer.steps % at_once:
            self._stretch(tile, s, kind, totals, T.int32(layer.steps - rest), rest)

    def _stretch(self, tile: Expr, s: Expr, kind: str, totals: Cells, start: Expr, steps: int) -> None:
        """Some steps from `start` on. A loop's body, or LLVM mixes up products until most of them are spilled."""
        layer, isa = self.layer, self.layer.isa
        held, quads, tokens = layer.held, layer.storage.quads, range(layer.tokens)
        lanes = isa.VECTOR * 32 // int(isa.PARTIAL[3:])
        for plane in range(layer.planes):
            partial = totals if isa.PARTIAL == "int32" else self._cells(isa.PARTIAL, lanes)
            with T.unroll(steps) as i:
                step = start + i
                codes = self._codes(s, step, plane, kind)
                for fields in (range(f, min(f + held, quads)) for f in range(0, quads, held)):
                    # Alone, as the template has it: in the other order 16 tokens of groups of 64 take 6 % longer.
                    order = product(tokens, fields) if kind == ALONE else ((t, f) for f, t in product(fields, tokens))
                    again = layer.tokens // isa.KNOBS["unpacked_asks"]
                    for t, f in order:
                        if kind == ALONE and plane == f == 0 and t % again == 0:
                            ask_codes(self.buffers["codes"], self.block, s, step, layer.ahead)
                        self._add(partial, codes[f], t, tile, s, step, f)
                    if held < quads:
                        self._gather(totals, partial, plane)
            if held >= quads:
                self._gather(totals, partial, plane)

    def _codes(self, s: Expr, step: Expr, plane: int, kind: str) -> list[list[Expr]]:
        """Codes or levels of a step's quads by parts, or a plane of them; what the tile's kind asks for and keeps."""
        if kind == REST:
            return self._kept(s, step, plane)
        if plane == 0 and kind == FIRST:  # the task before has asked memory for them
            ask_codes(self.buffers["codes"], self.block, s + 1, step, level=1)
        codes = self._unpacked(s, step, plane)
        if kind == FIRST:
            self._keep(s, step, plane, codes)
        return codes

    def _add(self, partial: Cells, codes: Sequence[Expr], t: int, tile: Expr, s: Expr, step: Expr, f: int) -> None:
        """A token's products with quad f of a step."""
        layer, isa, token = self.layer, self.layer.isa, tile * self.layer.tokens + t
        quad = self.buffers["q"].vload([token, s, step * layer.storage.inputs + f * QUAD], "int8x4")
        a = broadcast_quad(T.reinterpret("int32", quad), isa.VECTOR)
        if len(codes) > 1:
            a = vector.hold(a, QUAD * isa.VECTOR, "int8")
        for part, code in enumerate(codes):
            _set(partial[t, part], isa.multiply(_get(partial[t, part]), code, a))

    def _gather(self, totals: Cells, partial: Cells, plane: int) -> None:
        """Partial sums to where int32 holds a span."""
        if partial is totals:
            return
        for place, cell in partial.items():
            _set(totals[place], _get(totals[place]) + self.layer.isa.gather(_get(cell), plane))
            _clear(cell)

    def _line(self, step: Expr, plane: int, f: int) -> Expr:
        """Of what a span leaves: planes lie beside each other."""
        return (step * self.layer.storage.quads + f) * self.layer.planes + plane

    def _keep(self, s: Expr, step: Expr, plane: int, codes: Sequence[Sequence[Expr]]) -> None:
        """Codes or levels of a step, for the other tiles; the lines of the next span are asked for: no store misses."""
        for f, quad in enumerate(codes):
            line = self._line(step, plane, f)
            for part, code in enumerate(quad):
                T.buffer_store(self.unpacked, code, [s, line, self.layer.bytes_of(part)])
            vector.prefetch(self.unpacked, ((s + 1) * self.layer.lines + line) * BYTES, write=True)

    def _kept(self, s: Expr, step: Expr, plane: int) -> list[list[Expr]]:
        """The same, as the first tile left them."""
        layer, size = self.layer, QUAD * self.layer.isa.VECTOR

        def read(f: int, part: int) -> Expr:
            return vector.hold(self.unpacked[s, self._line(step, plane, f), layer.bytes_of(part)], size, "uint8")

        return [[read(f, part) for part in layer.parts] for f in range(layer.storage.quads)]

    def _unpacked(self, s: Expr, step: Expr, plane: int) -> list[list[Expr]]:
        """The same from the weight."""
        layer, isa, size = self.layer, self.layer.isa, QUAD * self.layer.isa.VECTOR
        at, found = [self.block // layer.x, s, step, self.block % layer.x], []
        for part in layer.parts:
            places = [[*at, v, part * isa.VECTOR, 0] for v in range(layer.storage.vectors)]
            w = [vector.hold(self.buffers["codes"].vload(place, f"uint8x{size}"), size, "uint8") for place in places]
            codes = storages.unpack(layer.storage, w, isa.VECTOR)
            if layer.planes > 1:
                codes = [storages.unpack(NIBBLES, [code], isa.VECTOR)[plane] for code in codes]
            elif layer.table is not None:
                codes = [isa.levels(layer.table, code) for code in codes]
            found.append([vector.hold(code, size, "uint8") for code in codes])
        return [list(quad) for quad in zip(*found, strict=True)]

    def _scale(self, first: Expr, s: Expr, kind: str, totals: Cells, sums: Cells) -> None:
        """A span's sums to fp32, in the operations and the order of schedules.linear_int8."""
        layer, buffers, lanes = self.layer, self.buffers, self.layer.isa.VECTOR
        floats, scales = f"float32x{lanes}", []
        for part in layer.parts:
            last = [s, layer.lines - 1, layer.bytes_of(part)]
            if kind == REST:
                scale = T.reinterpret(floats, self.unpacked[tuple(last)])
            else:
                scale = vector.load(buffers["scale"], *self._place(s, part), lanes=lanes)
            scales.append(vector.hold(scale, lanes))
            if kind == FIRST:
                T.buffer_store(self.unpacked, T.reinterpret(f"uint8x{QUAD * lanes}", scales[-1]), last)
        for (t, part), total in totals.items():
            cell, place = sums[t, part], self._place(s, part)
            centred, asum = _get(total), buffers["asum"][first + t, s]
            by_token = buffers["ascale"][first + t, s]
            if layer.table is not None:
                centred = centred - T.broadcast(T.int32(layer.isa.TABLE_ZERO) * asum, lanes)
            elif "zero" in buffers and len(buffers["zero"].shape) == 1:
                centred = centred - T.broadcast(T.Cast("int32", buffers["zero"][0]) * asum, lanes)
            elif "zero" in buffers:
                centred = centred - zeros_of(buffers["zero"], place, lanes) * T.broadcast(asum, lanes)
            factor = by_token if layer.table is None else by_token * T.float32(layer.unit)
            value = T.Cast(floats, centred) * (scales[part] * vector.splat(factor, lanes))
            if "offset" in buffers:
                weight = vector.splat(T.Cast("float32", asum) * by_token, lanes)
                value = value + vector.load(buffers["offset"], *place, lanes=lanes) * weight
            vector.store(cell, vector.load(cell, 0, 0, lanes=lanes) + value, 0, 0, lanes=lanes)

    def _place(self, s: Expr, part: int) -> tuple[Expr, ...]:
        """Where a part's scales and zeros of a span begin."""
        x = self.layer.x
        return (self.block // x, s, self.block % x, part * self.layer.isa.VECTOR)

    def _write(self, token: Expr, row: Expr, cell: Any) -> None:
        """A token's rows of a part, as far as there are so many, with the residual."""
        base, lanes = self.buffers.get("residual"), self.layer.isa.VECTOR
        whole = self.layer.n % lanes == 0

        def write(lane: Expr, lanes: int) -> None:
            value = vector.load(cell, 0, lane, lanes=lanes)
            if base is not None:
                value = vector.load(base, token, row + lane, lanes=lanes) + value
            vector.store(self.buffers["out"], value, token, row + lane, lanes=lanes)

        if whole and blocks(self.layer.n) * LANES == self.layer.n:
            write(0, lanes)
        elif whole:
            with T.If(row < self.layer.n), T.Then():
                write(0, lanes)
        else:
            with T.serial(lanes) as lane, T.If(row + lane < self.layer.n), T.Then():
                write(lane, 1)


def _get(cell: Any) -> Expr:
    return cell[0, T.ramp(0, 1, cell.shape[1])]


def _set(cell: Any, value: Expr) -> None:
    T.buffer_store(cell, value, [0, T.ramp(0, 1, cell.shape[1])])


def _clear(cell: Any) -> None:
    _set(cell, T.broadcast(tirx.const(0, cell.ty.dtype), cell.shape[1]))
