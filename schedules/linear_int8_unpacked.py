"""Integer linear layers for prompts on AVX512-VNNI: codes of a block of rows are unpacked once, not for every tile.

Operators, arguments, layout of weights, sums and their order are those of schedules.linear_int8; results are equal to
the bit. A task is a block of 16 rows with all tokens, in tiles of TOKENS. Three bodies multiply a tile with the block:
  first   the first of many tiles: unpacks each step of codes, multiplies, and leaves the codes (or levels) and
          scales in the task's own memory: 16 rows x k bytes and more, in the second-level cache
  rest    all other tiles of a call with many: they read 64 bytes for every quad in one stream. A quad of activations is
          the memory operand of its VPDPBUSD; beside the products there is a load a quad, and the scaling
  alone   every tile of a call with few: unpacks as it goes and leaves nothing, as what a task leaves costs as much as
          eight tiles win
With many tiles each asks for its lines of the output and of the residual when it begins (tokens lie pages apart, so
nothing else would), and in `rest` for some of the next block's codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import isa as isas
from schedules import storage as storages
from schedules import vector
from schedules.balance import balanced
from schedules.counted import marks, real_tiles
from schedules.geometry import Geometry
from schedules.isa import avx512_vnni, broadcast_table
from schedules.kernel import Kernel, NotSuited, Request
from schedules.linear_function import linear_function, zeros_of
from schedules.linear_int8 import CODES, SCALE, int8_levels
from schedules.linear_int8 import LOWERS as FAMILY
from schedules.packed import blocks, factors_of, interleave, name_tail, weight_packings
from schedules.storage import LANES, ONE_BYTE, QUAD, Storage, Table
from schedules.vector import Expr

RANK = 7  # below AMX
TOKENS = 8  # accumulators and their fp32 sums: nothing is spilled
SPAN = 64  # stored inputs: shorter spans are mostly scaling, and lose 3 % here (32)
FEW = 8  # tiles; with more it pays to leave the codes unpacked
BYTES = LANES * QUAD
FIRST, REST, ALONE = "first", "rest", "alone"


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

    @property
    def steps(self) -> int:
        """Steps of a span."""
        return self.geometry.width // self.storage.inputs

    @property
    def lines(self) -> int:
        """Lines that a span leaves: its quads, and the scales."""
        return self.steps * self.storage.quads + 1


@dataclass
class _Task:
    """Emits one block of rows with all tokens."""

    layer: Layer
    buffers: dict[str, Any]
    block: Expr
    unpacked: Any = field(init=False)

    def emit(self) -> None:
        """Either way, and the choice."""
        layer, spans = self.layer, self.layer.geometry.spans
        tiles = real_tiles(layer.m, TOKENS)

        def loop() -> Any:
            return T.serial(layer.m // TOKENS, annotations=marks(TOKENS))

        with T.If(tiles > FEW):
            with T.Then():
                self.unpacked = T.alloc_buffer((spans, layer.lines, BYTES), "uint8", layout=None)
                with loop() as tile, T.If(tile == 0):
                    with T.Then():
                        self._tile(tile, FIRST)
                    with T.Else():
                        self._tile(tile, REST)
            with T.Else(), loop() as tile:
                self._tile(tile, ALONE)

    def _tile(self, tile: Expr, kind: str) -> None:
        """All spans of a tile, and its output."""
        layer, lanes = self.layer, LANES
        first, row = tile * TOKENS, self.block * LANES
        sums = [vector.registers(1) for _ in range(TOKENS)]
        for t, cell in enumerate(sums):
            vector.store(cell, vector.splat(0.0, lanes), 0, 0, lanes=lanes)
            for name in ("residual", "out"):
                if name in self.buffers and kind != ALONE:
                    vector.prefetch(self.buffers[name], (first + t) * layer.n + row, write=name == "out")
        with T.serial(layer.geometry.spans) as s:
            totals = [vector.registers(1, dtype="int32") for _ in range(TOKENS)]
            for total in totals:
                T.buffer_store(total, T.broadcast(T.int32(0), lanes), [0, T.ramp(0, 1, lanes)])
            self._multiply(tile, s, kind, totals)
            self._scale(first, s, kind, totals, sums)
        for t, cell in enumerate(sums):
            self._write(first + t, row, cell)

    def _multiply(self, tile: Expr, s: Expr, kind: str, totals: Sequence[Any]) -> None:
        """Integer sums of a span."""
        layer, first = self.layer, tile * TOKENS
        if kind == REST:  # step `tile`, and those that no tile stands for, of this span in the next block
            for step in range(0, layer.steps, layer.m // TOKENS):
                self._ask_codes(self.block + 1, s, T.min(tile + step, T.int32(layer.steps - 1)))
        with T.unroll(layer.steps) as step:
            if kind == FIRST:  # the task before has asked memory for them
                self._ask_codes(self.block, s + 1, step, level=1)
            codes = self._kept(s, step) if kind == REST else self._unpacked(s, step)
            if kind == FIRST:
                self._keep(s, step, codes)
            if kind == ALONE:  # as the template has it: few rows wait for memory, and not every wish is granted at once
                for t, total in enumerate(totals):
                    self._ask_codes(self.block, s, step, layer.ahead)
                    for f, code in enumerate(codes):
                        self._add(total, code, first + t, s, step, f)
            else:
                for f, code in enumerate(codes):
                    for t, total in enumerate(totals):
                        self._add(total, code, first + t, s, step, f)

    def _add(self, total: Any, code: Expr, token: Expr, s: Expr, step: Expr, f: int) -> None:
        """A token's products with quad f of a step."""
        quad = self.buffers["q"].vload([token, s, step * self.layer.storage.inputs + f * QUAD], "int8x4")
        place, a = (0, T.ramp(0, 1, LANES)), [T.reinterpret("int32", quad)]
        T.buffer_store(total, avx512_vnni.step(ONE_BYTE, None, total[place], [code], a), list(place))

    def _keep(self, s: Expr, step: Expr, codes: Sequence[Expr]) -> None:
        """Codes or levels of a step, for the other tiles; the lines of the next span are asked for: no store misses."""
        for f, code in enumerate(codes):
            T.buffer_store(self.unpacked, code, [s, step * len(codes) + f, T.ramp(0, 1, BYTES)])
            vector.prefetch(self.unpacked, ((s + 1) * self.layer.lines + step * len(codes) + f) * BYTES, write=True)

    def _kept(self, s: Expr, step: Expr) -> list[Expr]:
        """Codes or levels of a step's quads, as the first tile left them."""
        place, quads = step * self.layer.storage.quads, range(self.layer.storage.quads)
        return [vector.hold(self.unpacked[s, place + f, T.ramp(0, 1, BYTES)], BYTES, "uint8") for f in quads]

    def _unpacked(self, s: Expr, step: Expr) -> list[Expr]:
        """The same from the weight."""
        layer, table = self.layer, self.layer.table
        at = [self.block // layer.x, s, step, self.block % layer.x]
        vectors = range(layer.storage.vectors)
        w = [vector.hold(self.buffers["codes"].vload([*at, v, 0, 0], "uint8x64"), BYTES, "uint8") for v in vectors]
        codes = storages.unpack(layer.storage, w, LANES)
        if table is not None:
            levels, name = broadcast_table(table, LANES), "llvm.x86.avx512.pshuf.b.512"
            codes = [T.reinterpret("uint8x64", T.call_llvm_pure_intrin("int8x64", name, levels, c)) for c in codes]
        return [vector.hold(code, BYTES, "uint8") for code in codes]

    def _ask_codes(self, block: Expr, s: Expr, step: Expr, ahead: int = 0, level: int = 2) -> None:
        """Ask for a step of a block's codes, or for what lies so many bytes behind it, into a cache."""
        layer, size = self.layer, self.layer.storage.vectors * BYTES
        index = ((block // layer.x * layer.geometry.spans + s) * layer.steps + step) * layer.x + block % layer.x
        for v in range(layer.storage.vectors):
            vector.prefetch(self.buffers["codes"], index * size + (v * BYTES + ahead), level)

    def _scale(self, first: Expr, s: Expr, kind: str, totals: Sequence[Any], sums: Sequence[Any]) -> None:
        """A span's sums to fp32, in the operations and the order of schedules.linear_int8."""
        layer, buffers, lanes = self.layer, self.buffers, LANES
        place = (self.block // layer.x, s, self.block % layer.x, 0)
        last = (s, layer.lines - 1, T.ramp(0, 1, BYTES))
        if kind == REST:
            scale = vector.hold(T.reinterpret("float32x16", self.unpacked[last]), lanes)
        else:
            scale = vector.hold(vector.load(buffers["scale"], *place, lanes=lanes), lanes)
        if kind == FIRST:
            T.buffer_store(self.unpacked, T.reinterpret("uint8x64", scale), list(last))
        for t, (total, cell) in enumerate(zip(totals, sums, strict=True)):
            centred, asum = total[0, T.ramp(0, 1, lanes)], buffers["asum"][first + t, s]
            by_token = buffers["ascale"][first + t, s]
            if layer.table is not None:
                centred = centred - T.broadcast(T.int32(avx512_vnni.TABLE_ZERO) * asum, lanes)
            elif "zero" in buffers and len(buffers["zero"].shape) == 1:
                centred = centred - T.broadcast(T.Cast("int32", buffers["zero"][0]) * asum, lanes)
            elif "zero" in buffers:
                centred = centred - zeros_of(buffers["zero"], place, lanes) * T.broadcast(asum, lanes)
            factor = by_token if layer.table is None else by_token * T.float32(layer.unit)
            value = T.Cast("float32x16", centred) * (scale * vector.splat(factor, lanes))
            if "offset" in buffers:
                weight = vector.splat(T.Cast("float32", asum) * by_token, lanes)
                value = value + vector.load(buffers["offset"], *place, lanes=lanes) * weight
            vector.store(cell, vector.load(cell, 0, 0, lanes=lanes) + value, 0, 0, lanes=lanes)

    def _write(self, token: Expr, row: Expr, cell: Any) -> None:
        """A token's rows of the block, as far as there are so many, with the residual."""
        base, whole = self.buffers.get("residual"), self.layer.n % LANES == 0

        def write(lane: Expr, lanes: int) -> None:
            value = vector.load(cell, 0, lane, lanes=lanes)
            if base is not None:
                value = vector.load(base, token, row + lane, lanes=lanes) + value
            vector.store(self.buffers["out"], value, token, row + lane, lanes=lanes)

        if whole and blocks(self.layer.n) * LANES == self.layer.n:
            write(0, LANES)
        elif whole:
            with T.If(row < self.layer.n), T.Then():
                write(0, LANES)
        else:
            with T.serial(LANES) as lane, T.If(row + lane < self.layer.n), T.Then():
                write(lane, 1)


def _suited(request: Request) -> None:
    """Raise NotSuited for other targets, too few tokens, short spans, and codes of a byte, which need no unpacking."""
    m = request.args[0].shape[0]
    width = Geometry(request.args[CODES].shape[1], int(request.attrs["group"])).width
    packed = storages.choose(int(request.attrs["bits"]), width).quads > 1
    pays = packed and width >= SPAN and m // TOKENS > FEW
    if isas.choose(request.target).NAME != avx512_vnni.NAME or m % TOKENS or not pays:
        raise NotSuited


def lower(request: Request) -> Kernel:
    """Prompt kernels of 72 tokens and more; anybody else is asked next. No knobs."""
    _suited(request)
    m, (n, k) = request.args[0].shape[0], request.args[CODES].shape
    geometry, affine = Geometry(k, int(request.attrs["group"])), factors_of(request, SCALE)
    scale_dtype, residual = request.args[SCALE].dtype, request.op.endswith("_residual")
    storage = storages.choose(int(request.attrs["bits"]), geometry.width)
    table, unit = (None, 1.0) if request.table is None else int8_levels(request.table)
    if table is not None:
        table = tuple(v + avx512_vnni.TABLE_ZERO for v in table)
    kind, x = request.attrs.get("grid", storage.name), interleave(n, avx512_vnni.KNOBS["row_blocks"])
    tail = name_tail(affine, residual)
    name = f"linear_{kind}a8_{avx512_vnni.NAME}_unpacked_m{m}_n{n}_k{k}_g{geometry.group}_s{scale_dtype[5:]}{tail}"
    layer = Layer(m, n, geometry, storage, table, unit, x, avx512_vnni.KNOBS["gemm_prefetch_bytes"])
    function = linear_function(name, m, n, geometry, storage, scale_dtype, affine, residual, x)
    with IRBuilder() as builder, function as buffers, T.parallel(blocks(n)) as block:
        _Task(layer, buffers, block).emit()
    return Kernel(name, balanced(builder.get()), weight_packings(CODES, n, geometry, storage, scale_dtype, affine, x))


LOWERS = dict.fromkeys(FAMILY, lower)
