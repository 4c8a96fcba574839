"""AMX: the integer linear layers of schedules.linear_int8 for many tokens, on tiles; weights lie as they do there.

Operators, arguments, sums and their order are those of schedules.linear_int8, so results are equal to the bit: what a
token gives does not depend on which of the two computed it. Not suited below LEAST_TOKENS tokens.

Tiles have at most 16 rows of 64 bytes. For `depth` inputs of a span, at most 64 and a multiple of 4:
  A  16 tokens x depth bytes                      activations as they lie in q
  B  depth / 4 rows x (16 rows of W x 4 inputs)   codes unpacked to bytes: a vector of the packed layout is a row of B
  C  16 tokens x 16 rows of W, int32              the integer of a span
TDPBSSD multiplies signed weights: levels of a table grid, or code - zero, which lies within +-63 up to 6 bits and
leaves no correction. TDPBSUD takes 8-bit codes, and those with an offset, as they are; zero * asum then
leaves in fp32: both products are integers of at most 128 * 255 * 127 < 2**22, so that their difference is exact.

A task is 32 rows (row_blocks of 16) and all tokens, span by span: it unpacks the span's codes once, into the
first-level cache, and takes token_tiles tiles of 16 tokens a step. m need be no multiple of 16: the last tile then
begins at token m - 16, and some tokens are computed twice and written twice, with the same values. Codes are asked for
prefetch_bytes ahead, and behind the task's last span those of the next task: they lie 128 of every 512 bytes, which no
hardware prefetcher follows, and by count a span's products take less time than memory takes to answer.

What a step costs by count, 2 x 2 tiles and a span of 128 inputs (no machine with AMX has timed it): 8 TDP of 16 cycles,
128. Two load ports: 8 tiles of 16 lines, 64 lines of C, 64 of accumulators, 32 scales, 144. One store port: C and
accumulators, 128. Two arithmetic ports: conversion, product, multiply-add for 64 vectors, 96 (128 with TDPBSUD). The
some 400 micro-operations of a step and the next one's tiles fit into the reorder buffer of 512, so these overlap. The
ceiling is 128 / 144 = 0.89 of what TDP can do; unpacking, 80 cycles a span and task, makes it 0.78 for 128 tokens and
0.86 for 512. Spans of 64 and 32 are bound by stores: 0.50 and 0.25. With token_tiles 1 the B tiles stay in registers
over all tokens (loads 56, stores 64 of 64 cycles), but only two sums are under way, and TDP's latency is 52 cycles:
that is for a machine to decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import isa as isas
from schedules import storage as storages
from schedules import vector
from schedules.balance import balanced
from schedules.counted import marks
from schedules.geometry import Geometry
from schedules.isa import avx512_vnni, broadcast_table
from schedules.kernel import Kernel, NotSuited, Request, Space
from schedules.linear_function import ask_codes, linear_function, zeros_of
from schedules.linear_int8 import CODES, SCALE, int8_levels, tuned_alike
from schedules.linear_int8 import LOWERS as FAMILY
from schedules.packed import blocks, factors_of, interleave, name_tail, weight_packings
from schedules.storage import LANES, QUAD, Storage, Table
from schedules.vector import Expr

RANK = 10
NEEDS = ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "amx-tile", "amx-int8")
LEAST_TOKENS = 16
TILES, TILE_ROWS, TILE_BYTES = 8, 16, 64
Factors = tuple[Expr, Expr | None, Expr | None]  # scale, zero, offset: fp32 vectors of 16 rows of W
SIGNED_BITS = 6  # code - zero of at most so many bits is an int8


@dataclass(frozen=True)
class Plan:
    """Which tile holds what. The blocking is two knobs; B stays in tiles over all tokens where there are enough."""

    token_tiles: int
    row_blocks: int
    prefetch_bytes: int
    parts: int = 1  # tiles along the inputs of a span

    @property
    def tiles(self) -> int:
        """How many it needs at least."""
        return self.token_tiles * (self.row_blocks + 1) + self.row_blocks

    @property
    def resident(self) -> bool:
        """Whether the B tiles of a whole span fit beside the others."""
        return self.token_tiles * (self.row_blocks + 1) + self.row_blocks * self.parts <= TILES

    def c(self, t: int, b: int) -> int:
        """Tile of the sums of token tile t and row block b."""
        return t * self.row_blocks + b

    def a(self, t: int) -> int:
        """Tile of the activations of token tile t."""
        return self.token_tiles * self.row_blocks + t

    def b(self, b: int, part: int) -> int:
        """Tile of the weights of row block b."""
        return self.token_tiles * (self.row_blocks + 1) + b + (part * self.row_blocks if self.resident else 0)

    def configuration(self, depth: int) -> list[int]:
        """The 64 bytes of LDTILECFG, palette 1: Intel SDM volume 1, table 18-1. A tile that is not used has size 0."""
        rows, width = [0] * TILES, [0] * TILES
        for t in range(self.token_tiles):
            rows[self.a(t)], width[self.a(t)] = TILE_ROWS, depth
            for b in range(self.row_blocks):
                rows[self.c(t, b)], width[self.c(t, b)] = TILE_ROWS, TILE_BYTES
                for part in range(self.parts):
                    rows[self.b(b, part)], width[self.b(b, part)] = depth // QUAD, TILE_BYTES
        return [1, *[0] * 15, *(byte for w in width for byte in (w, 0)), *[0] * 16, *rows, *[0] * 8]


def _default(m: int) -> dict[str, int]:
    return {
        "token_tiles": min(2, -(-m // TILE_ROWS)), "row_blocks": 2,
        "prefetch_bytes": avx512_vnni.KNOBS["gemm_prefetch_bytes"],
    }  # fmt: skip


def _plan(request: Request, m: int, n: int, width: int) -> Plan:
    plan = Plan(**_default(m) | dict(request.knobs), parts=-(-width // TILE_BYTES))
    assert plan.tiles <= TILES, f"too few tiles for {plan}"
    assert blocks(n) % plan.row_blocks == 0, f"{blocks(n)} row blocks are no multiple of {plan.row_blocks}"
    return plan


def _tile(name: str, *args: Expr) -> None:
    """Emit a tile instruction; plain integers are tile numbers."""
    numbers = [T.int8(arg) if isinstance(arg, int) else arg for arg in args]
    T.evaluate(T.call_llvm_intrin("", f"llvm.x86.{name}", *numbers))


class Task:
    """Emits the work on one task's rows. Buffers beyond 1 KiB are TVM's workspace: taken once a task, not in a loop."""

    def __init__(
        self,
        m: int,
        n: int,
        geometry: Geometry,
        storage: Storage,
        x: int,
        plan: Plan,
        signed: bool,
        levels: tuple[Table, float] | None,
        buffers: dict[str, Any],
        first: Expr,
    ) -> None:
        self.m, self.n, self.geometry, self.storage, self.plan, self.signed = m, n, geometry, storage, plan, signed
        self.table: Table | None = levels and levels[0]
        self.unit = levels[1] if levels else 1.0
        self.buffers, self.first, self.x = buffers, first, x  # the task's first row block; blocks beside each other
        self.depth = geometry.width // plan.parts
        tokens = plan.token_tiles * TILE_ROWS
        self.steps = -(-m // tokens)
        self.weights = T.alloc_buffer((plan.row_blocks, geometry.width // QUAD, TILE_BYTES), "uint8", layout=None)
        self.sums = T.alloc_buffer((plan.token_tiles, plan.row_blocks, TILE_ROWS, LANES), "int32", layout=None)
        self.acc = T.alloc_buffer((self.steps * tokens, plan.row_blocks, LANES), "float32", layout=None)

    def emit(self) -> None:
        """Configure, then every span for every token, then residual and output."""
        self._configure()
        tokens = self.plan.token_tiles * TILE_ROWS
        with T.serial(self.steps * tokens, annotations=marks(tokens, tokens)) as row:
            for b in range(self.plan.row_blocks):
                vector.store(self.acc, vector.splat(0.0, LANES), row, b, 0, lanes=LANES)
        with T.serial(self.geometry.spans) as s:
            for b in range(self.plan.row_blocks):
                self._unpack(s, b)
            factors = [self._row_factors(s, b) for b in range(self.plan.row_blocks)]
            if self.plan.resident:
                for part in range(self.plan.parts):
                    self._load_weights(part)
            with T.serial(self.steps, annotations=marks(tokens)) as step:
                self._multiply(s, step)
                for t in range(self.plan.token_tiles):
                    with T.serial(TILE_ROWS) as r:
                        self._scale(s, step, t, r, factors)
        _tile("tilerelease")
        with T.serial(self.steps, annotations=marks(tokens)) as step:
            for t in range(self.plan.token_tiles):
                with T.serial(TILE_ROWS) as r:
                    self._write(step, t, r)

    def _configure(self) -> None:
        """One vector store of constants: LLVM's ldtilecfg may read any memory, so the store stays before it."""
        data = bytes(self.plan.configuration(self.depth))
        words = [T.int32(int.from_bytes(data[i : i + 4], "little", signed=True)) for i in range(0, len(data), 4)]
        config = T.alloc_buffer((len(words),), "int32", layout=None)
        T.buffer_store(config, tirx.Shuffle(words, list(range(len(words)))), [T.ramp(0, 1, len(words))])
        _tile("ldtilecfg", T.address_of(config[0]))

    def _start(self, step: Expr, t: int) -> Expr:
        """First token of a tile: those that would reach beyond the last token begin so much earlier."""
        start = (step * self.plan.token_tiles + t) * TILE_ROWS
        return start if self.steps * self.plan.token_tiles * TILE_ROWS == self.m else T.min(start, self.m - TILE_ROWS)

    def _block(self, b: int) -> tuple[Expr, Expr]:
        """Where the task's row block b lies in weights: which x blocks, and which of them."""
        return (self.first + b) // self.x, (self.first + b) % self.x

    def _unpack(self, s: Expr, b: int) -> None:
        """The span's codes as bytes, or what they stand for, to `weights`."""
        storage, codes, wide, (outer, inner) = self.storage, self.buffers["codes"], QUAD * LANES, self._block(b)
        zero = None
        if self.signed and self.table is None:
            row_zero = zeros_of(self.buffers["zero"], (outer, s, inner, 0), LANES)
            each = T.reinterpret(f"int8x{wide}", row_zero * T.broadcast(T.int32(0x01010101), LANES))
            zero = vector.hold(each, wide, "int8")
        with T.serial(self.geometry.width // storage.inputs) as j:
            self._ask_codes(s, b, j)
            stored = [[outer, s, j, inner, v, 0, 0] for v in range(storage.vectors)]
            held = [vector.hold(codes.vload(place, f"uint8x{wide}"), wide, "uint8") for place in stored]
            for f, value in enumerate(storages.unpack(storage, held, LANES)):
                if self.table is not None:
                    table = broadcast_table(self.table, LANES)
                    value = T.call_llvm_pure_intrin(f"int8x{wide}", "llvm.x86.avx512.pshuf.b.512", table, value)
                elif zero is not None:
                    value = T.reinterpret(f"int8x{wide}", value) - zero
                place = [b, j * storage.quads + f, T.ramp(0, 1, wide)]
                T.buffer_store(self.weights, T.reinterpret(f"uint8x{wide}", value), place)

    def _ask_codes(self, s: Expr, b: int, j: Expr) -> None:
        """Ask for step j of what comes so many bytes later: of a later span, or of the task behind this one."""
        codes, spans = self.buffers["codes"], self.geometry.spans
        ahead = min(-(-self.plan.prefetch_bytes // prod(map(int, codes.shape[2:]))), spans)
        if ahead == 0:
            return
        within = s + ahead < spans
        span = T.Select(within, s + ahead, s + (ahead - spans))
        ask_codes(codes, self.first + b + T.Select(within, T.int32(0), T.int32(self.plan.row_blocks)), span, j)

    def _row_factors(self, s: Expr, b: int) -> Factors:
        """What a span of row block b is scaled with; zero where it is still to be taken away."""
        outer, inner = self._block(b)
        found: list[Expr | None] = []
        for name in ("scale", "zero", "offset"):
            buffer = self.buffers.get(name)
            if buffer is None or (name == "zero" and self.signed):
                found.append(None)
            elif name == "zero":
                zeros = T.Cast(f"float32x{LANES}", zeros_of(buffer, (outer, s, inner, 0), LANES))
                found.append(vector.hold(zeros, LANES))
            else:
                found.append(vector.hold(vector.load(buffer, outer, s, inner, 0, lanes=LANES), LANES))
        scale, zero, offset = found
        return scale, zero, offset

    def _load_weights(self, part: int) -> None:
        for b in range(self.plan.row_blocks):
            place = T.address_of(self.weights[b, part * self.depth // QUAD, 0])
            _tile("tileloadd64", self.plan.b(b, part), place, T.int64(TILE_BYTES))

    def _multiply(self, s: Expr, step: Expr) -> None:
        """One span of all tiles of the step, to `sums`."""
        plan, stride = self.plan, T.int64(self.geometry.spans * self.geometry.width)
        pairs = [(t, b) for t in range(plan.token_tiles) for b in range(plan.row_blocks)]
        for t, b in pairs:
            _tile("tilezero", plan.c(t, b))
        for part in range(plan.parts):
            if not plan.resident:
                self._load_weights(part)
            for t in range(plan.token_tiles):
                place = T.address_of(self.buffers["q"][self._start(step, t), s, part * self.depth])
                _tile("tileloadd64", plan.a(t), place, stride)
            for t, b in pairs:
                _tile("tdpbssd" if self.signed else "tdpbsud", plan.c(t, b), plan.a(t), plan.b(b, part))
        for t, b in pairs:
            _tile("tilestored64", plan.c(t, b), T.address_of(self.sums[t, b, 0, 0]), T.int64(LANES * 4))

    def _scale(self, s: Expr, step: Expr, t: int, r: Expr, factors: list[Factors]) -> None:
        """Add the span of one token to its accumulators, in the operations and the order of schedules.linear_int8."""
        token, row = self._start(step, t) + r, (step * self.plan.token_tiles + t) * TILE_ROWS + r
        ascale, asum = self.buffers["ascale"][token, s], T.Cast("float32", self.buffers["asum"][token, s])
        by_token = ascale if self.table is None else ascale * T.float32(self.unit)
        for b, (scale, zero, offset) in enumerate(factors):
            centred = T.Cast(f"float32x{LANES}", self.sums[t, b, r, T.ramp(0, 1, LANES)])
            if zero is not None:
                centred = centred - zero * vector.splat(asum, LANES)
            value = centred * (scale * vector.splat(by_token, LANES))
            if offset is not None:
                value = value + offset * vector.splat(asum * ascale, LANES)
            before = vector.load(self.acc, row, b, 0, lanes=LANES)
            vector.store(self.acc, before + value, row, b, 0, lanes=LANES)

    def _write(self, step: Expr, t: int, r: Expr) -> None:
        """One token's rows to the output, with the residual."""
        token, row = self._start(step, t) + r, (step * self.plan.token_tiles + t) * TILE_ROWS + r
        base, out = self.buffers.get("residual"), self.buffers["out"]
        lanes = LANES if blocks(self.n) * LANES == self.n else 1
        for b in range(self.plan.row_blocks):
            with T.serial(LANES // lanes) as lane:
                column = (self.first + b) * LANES + lane

                def write(b: int = b, lane: Expr = lane, column: Expr = column) -> None:
                    value = vector.load(self.acc, row, b, lane, lanes=lanes)
                    value = value if base is None else vector.load(base, token, column, lanes=lanes) + value
                    vector.store(out, value, token, column, lanes=lanes)

                if lanes == LANES:
                    write()
                else:
                    with T.If(column < self.n), T.Then():
                        write()


def _suited(request: Request) -> tuple[int, tuple[int, ...]]:
    """Tokens, and shape of the codes; raises NotSuited for another target or too few tokens."""
    m = request.args[0].shape[0]
    if m < LEAST_TOKENS or not all(request.target.has(feature) for feature in NEEDS):
        raise NotSuited
    return m, request.args[CODES].shape


def lower(request: Request) -> Kernel:
    """The kernel for an AMX target and enough tokens; anybody else is asked next."""
    m, (n, k) = _suited(request)
    geometry, affine = Geometry(k, int(request.attrs["group"])), factors_of(request, SCALE)
    bits, scale_dtype = int(request.attrs["bits"]), request.args[SCALE].dtype
    storage = storages.choose(bits, geometry.width)
    plan = _plan(request, m, n, geometry.width)
    signed = affine == "table" or ("zero" in affine and bits <= SIGNED_BITS)
    levels = None if request.table is None else int8_levels(request.table)
    residual = request.op.endswith("_residual")
    kind = request.attrs.get("grid", storage.name)
    tail = name_tail(affine, residual)
    tiles = f"t{plan.token_tiles}x{plan.row_blocks}" + ("" if signed else "_unsigned")
    name = f"linear_{kind}a8_amx_{tiles}_m{m}_n{n}_k{k}_g{geometry.group}_s{scale_dtype[5:]}{tail}"
    nb, x = blocks(n), interleave(n, isas.choose(request.target).KNOBS["row_blocks"])
    function = linear_function(name, m, n, geometry, storage, scale_dtype, affine, residual, x)
    with IRBuilder() as builder, function as buffers:
        with T.parallel(nb // plan.row_blocks) as i:
            Task(m, n, geometry, storage, x, plan, signed, levels, buffers, i * plan.row_blocks).emit()
    packings = weight_packings(CODES, n, geometry, storage, scale_dtype, affine, x)
    return Kernel(name, balanced(builder.get()), packings)


LOWERS = dict.fromkeys(FAMILY, lower)


def space(request: Request) -> Space:
    """What tuning may try."""
    m, (n, k) = _suited(request)
    tried = {
        "token_tiles": tuple(t for t in (1, 2, 3) if t <= -(-m // TILE_ROWS)),
        "row_blocks": tuple(b for b in (1, 2, 3) if blocks(n) % b == 0),
        "prefetch_bytes": (0, 8192, 24576, 49152),
    }
    return Space.around(
        _default(m), tried, schedule="linear_int8.amx", workload=tuned_alike(request), macs=m * n * k,
        allowed=lambda knobs: Plan(**knobs).tiles <= TILES,
    )  # fmt: skip


SPACES = dict.fromkeys(LOWERS, space)
