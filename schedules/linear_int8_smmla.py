"""Integer linear layers for several tokens on NEON's int8 matrix instructions (i8mm: Cortex-X3, A715, A710, A510).

Operators, arguments, sums and their order are those of schedules.linear_int8, and so is the layout of weights: results
are equal to the bit. USMMLA and SMMLA multiply 2 rows x 8 inputs by 2 tokens x 8 inputs, twice the work of USDOT. Two
vectors of the layout, each 4 rows x 4 inputs, become two of 2 rows x 8 inputs by ZIP1 and ZIP2, which all tokens of a
tile share; the 2 x 2 blocks of sums become vectors of 4 rows by UZP1 and UZP2, once a span.

Codes are unsigned (USMMLA), levels of table grids signed (SMMLA). Exact: no sum comes near 2**31. A tile is 8 rows and
4 or 8 tokens: 16 sums stay in registers. Tokens that make no such tiles are left to schedules.linear_int8: with two
tokens the ZIPs cost more than the products save.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import isa as isas
from schedules import storage as storages
from schedules import vector
from schedules.counted import marks
from schedules.geometry import Geometry
from schedules.isa import neon_dotprod, neon_i8mm
from schedules.kernel import Kernel, NotSuited, Request
from schedules.linear_function import linear_function, zeros_of
from schedules.linear_int8 import CODES, SCALE, int8_levels
from schedules.linear_int8 import LOWERS as FAMILY
from schedules.packed import blocks, factors_of, interleave, name_tail, weight_packings
from schedules.storage import LANES, QUAD, Storage, Table
from schedules.vector import Expr

RANK = 8
ROWS, DEPTH, VECTOR = 8, 8, 4  # rows of a tile; inputs of an instruction; lanes of int32 and fp32
TOKENS = (8, 4)
ZIP1, ZIP2, UZP1, UZP2 = [0, 4, 1, 5], [2, 6, 3, 7], [0, 2, 4, 6], [1, 3, 5, 7]


@dataclass
class _Tile:
    """Emits eight rows of `tokens` tokens."""

    geometry: Geometry
    storage: Storage
    table: Table | None
    unit: float
    n: int
    tokens: int
    x: int
    buffers: dict[str, Any]
    block: Expr
    lane: Expr
    first: Expr
    acc: Any = field(init=False)
    sums: Any = field(init=False)

    def emit(self) -> None:
        """Span by span, then the output."""
        self.acc = vector.registers(ROWS // VECTOR * self.tokens, VECTOR)
        self.sums = vector.registers(ROWS // 2 * self.tokens // 2, VECTOR, "int32")
        for i in range(ROWS // VECTOR * self.tokens):
            vector.store(self.acc, vector.splat(0.0, VECTOR), i, 0, lanes=VECTOR)
        steps = DEPTH // (QUAD * self.storage.quads) or 1  # of the layout, in a loop's body
        with T.serial(self.geometry.spans) as s:
            for i in range(ROWS * self.tokens // 4):
                T.buffer_store(self.sums, T.broadcast(T.int32(0), VECTOR), [i, T.ramp(0, 1, VECTOR)])
            with T.serial(self.geometry.width // self.storage.inputs // steps) as j:
                self._multiply(s, j * steps, steps)
            for half, t in product(range(ROWS // VECTOR), range(self.tokens)):
                self._scale(s, half, t)
        for half, t in product(range(ROWS // VECTOR), range(self.tokens)):
            self._write(half, t)

    def _place(self, s: Expr, half: int) -> tuple[Expr, ...]:
        """Index of a span's factors of four rows, but for the lanes."""
        return self.block // self.x, s, self.block % self.x, self.lane + half * VECTOR

    def _multiply(self, s: Expr, step: Expr, steps: int) -> None:
        """The inputs of some steps of the layout, for all rows and tokens."""
        rows = [[v for u in range(steps) for v in self._bytes(s, step + u, half)] for half in range(ROWS // VECTOR)]
        name = "llvm.aarch64.neon.usmmla" if self.table is None else "llvm.aarch64.neon.smmla"
        for p in range(len(rows[0]) // 2):
            pairs = [
                vector.hold(T.reinterpret("int8x16", tirx.Shuffle(values[2 * p : 2 * p + 2], order)), 16, "int8")
                for values in rows
                for order in (ZIP1, ZIP2)
            ]
            start = step * self.storage.inputs + p * DEPTH
            for t in range(0, self.tokens, 2):
                two = (self._inputs(t + i, s, start) for i in (0, 1))
                x = vector.hold(T.vectorcombine("int8x16", *two), 16, "int8")
                for r, w in enumerate(pairs):
                    at = [r * (self.tokens // 2) + t // 2, T.ramp(0, 1, VECTOR)]
                    T.buffer_store(self.sums, T.call_llvm_pure_intrin("int32x4", name, self.sums[tuple(at)], w, x), at)

    def _bytes(self, s: Expr, step: Expr, half: int) -> list[Expr]:
        """int32 vectors [4 rows], each with four inputs' codes or levels, of every quad of a step."""
        outer, span, inner, lane = self._place(s, half)
        places = [[outer, span, step, inner, v, lane, 0] for v in range(self.storage.vectors)]
        held = [vector.hold(self.buffers["codes"].vload(at, "uint8x16"), 16, "uint8") for at in places]
        values = neon_dotprod.codes_or_levels(self.storage, self.table, held)
        return [vector.hold(T.reinterpret("int32x4", value), VECTOR, "int32") for value in values]

    def _inputs(self, t: int, s: Expr, start: Expr) -> Expr:
        return self.buffers["q"][self.first + t, s, T.ramp(start, 1, DEPTH)]

    def _scale(self, s: Expr, half: int, t: int) -> None:
        """Four rows' sums of a token, in the operations and the order of schedules.linear_int8."""
        token, buffers = self.first + t, self.buffers
        blocks_of = [(2 * half + i) * (self.tokens // 2) + t // 2 for i in (0, 1)]
        both = [self.sums[i, T.ramp(0, 1, VECTOR)] for i in blocks_of]
        centred = tirx.Shuffle(both, UZP2 if t % 2 else UZP1)
        *place, lane = self._place(s, half)
        asum, by_token = buffers["asum"][token, s], buffers["ascale"][token, s]
        if "zero" in buffers:
            centred = centred - zeros_of(buffers["zero"], (*place, lane), VECTOR) * T.broadcast(asum, VECTOR)
        if self.table is not None:
            by_token = by_token * T.float32(self.unit)
        factor = vector.load(buffers["scale"], *place, lane, lanes=VECTOR) * vector.splat(by_token, VECTOR)
        value = T.Cast("float32x4", centred) * factor
        if "offset" in buffers:
            weight = T.Cast("float32", asum) * buffers["ascale"][token, s]
            value = value + vector.load(buffers["offset"], *place, lane, lanes=VECTOR) * vector.splat(weight, VECTOR)
        cell = half * self.tokens + t
        vector.store(self.acc, vector.load(self.acc, cell, 0, lanes=VECTOR) + value, cell, 0, lanes=VECTOR)

    def _write(self, half: int, t: int) -> None:
        """Four rows of a token, as far as there are so many, with the residual."""
        token, row, base = self.first + t, self.block * LANES + self.lane + half * VECTOR, self.buffers.get("residual")
        lanes = VECTOR if self.n % VECTOR == 0 else 1

        def write(offset: int) -> None:
            value = vector.load(self.acc, half * self.tokens + t, offset, lanes=lanes)
            if base is not None:
                value = vector.load(base, token, row + offset, lanes=lanes) + value
            vector.store(self.buffers["out"], value, token, row + offset, lanes=lanes)

        for offset in range(0, VECTOR, lanes):
            if blocks(self.n) * LANES == self.n:
                write(offset)
            else:
                with T.If(row + offset < self.n), T.Then():
                    write(offset)


def lower(request: Request) -> Kernel:
    """For targets with i8mm and tokens in fours; anybody else is asked next. Knob: tokens of a tile."""
    m, (n, k) = request.args[0].shape[0], request.args[CODES].shape
    if m % min(TOKENS) or not all(request.target.has(feature) for feature in neon_i8mm.NEEDS):
        raise NotSuited
    geometry, affine = Geometry(k, int(request.attrs["group"])), factors_of(request, SCALE)
    scale_dtype = request.args[SCALE].dtype
    storage = storages.choose(int(request.attrs["bits"]), geometry.width)
    table, unit = (None, 1.0) if request.table is None else int8_levels(request.table)
    tokens = int(request.knobs.get("tokens", next(t for t in TOKENS if m % t == 0)))
    kind, residual = request.attrs.get("grid", storage.name), request.op.endswith("_residual")
    tail = name_tail(affine, residual)
    name = f"linear_{kind}a8_smmla_t{tokens}_m{m}_n{n}_k{k}_g{geometry.group}_s{scale_dtype[5:]}{tail}"
    nb, x = blocks(n), interleave(n, isas.choose(request.target).KNOBS["row_blocks"])
    function = linear_function(name, m, n, geometry, storage, scale_dtype, affine, residual, x)
    with IRBuilder() as builder, function as buffers:
        tiles = T.serial(m // tokens, annotations=marks(tokens))
        with T.parallel(nb) as block, T.serial(LANES // ROWS) as eight, tiles as tile:
            at = (block, eight * ROWS, tile * tokens)
            _Tile(geometry, storage, table, unit, n, tokens, x, buffers, *at).emit()
    return Kernel(name, builder.get(), weight_packings(CODES, n, geometry, storage, scale_dtype, affine, x))


LOWERS = dict.fromkeys(FAMILY, lower)
