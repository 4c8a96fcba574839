"""Causal attention over a cache of int8 keys and values with one scale a (kv head, position).

  quern.attention_int8  q f32[m, heads * d], k_cache i8[kv_heads, capacity/16, d/2, 32],
                        v_cache i8[kv_heads, capacity/2, 2 * dp], k_scale f32[kv_heads, capacity],
                        v_scale f32[kv_heads, capacity], span i32[2]; attributes as quern.attention -> f32[m, heads * d]

Key (h, t) = k_scale[h, t] * codes, element i at [h, t // 16, i // 2, t % 16 * 2 + i % 2]; value (h, t) likewise,
element i at [h, t // 2, 2 i + t % 2], dp = d rounded up to 16. What lies beyond the positions in use must be finite.

The frame is schedules.attention's: tasks, blocks, parts, masks. Products are integer, two of them a lane and
instruction, which is twice what fp32 does on every register width:
  scores   queries are rounded to Q = min(32767, (2^31 - 1) / (127 d)) levels of their largest element, one scale a row;
           |sum over d| <= Q * 127 * d < 2^31
  values   weights times v_scale are rounded to 32767 levels of the row's largest in this block;
           |sum over a block| <= 32767 * 127 * block < 2^31 for block <= 512
Both roundings are 2^7 times finer than that of the cache. Scores, softmax and sums over blocks are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import attention, vector
from schedules.attention import MASKED, Plan, Scores, Task, balanced
from schedules.kernel import Kernel, Request
from schedules.vector import LANES, Expr

LEVELS, INT8_LEVELS = 32767, 127
ROUNDS = 1.5 * 2**23
SMALLEST = 1e-34  # LEVELS / SMALLEST is still finite; a row or block with no larger element counts as zero
# Accumulators of one register each, by vector_bits: of scores (with up to two loads' latency to hide), of values.
ACCUMULATORS = {512: (16, 16), 256: (8, 8), 128: (8, 8)}
MOST_BLOCK = ((1 << 31) - 1) // (LEVELS * INT8_LEVELS) // LANES * LANES


def plan(request: Request, m: int, kv_heads: int, group: int, d: int) -> Plan:
    """Default plan, with the request's knobs put over it. `value_vectors` counts registers of columns."""
    scores, values = ACCUMULATORS[request.target.vector_bits]
    registers = LANES // (request.target.vector_bits // 32)  # of 16 lanes
    tile = max(t for t in range(1, m + 1) if m % t == 0 and (t == 1 or t * group <= 8))
    rows = int(request.knobs.get("tile", tile)) * group
    key_rows = len(balanced(rows, max(1, scores // registers))[0])
    value_rows = len(balanced(rows, 4)[0])
    columns = -(-d // LANES) * registers
    chosen = {
        "tile": tile,
        "block": min(max(attention.BLOCK_BYTES * 2 // d // LANES * LANES, 32), MOST_BLOCK),
        "key_rows": key_rows,
        "key_chains": attention.largest_divisor(d // 2, max(1, scores // registers // key_rows)),
        "value_rows": value_rows,
        "value_vectors": attention.largest_divisor(columns, max(1, values // value_rows)),
        "prefetch": int(rows > 1),
        "parts": attention.parts(m, kv_heads),
    }
    made = Plan(**{key: int(request.knobs.get(key, default)) for key, default in chosen.items()})
    assert made.block <= MOST_BLOCK, made
    return made


class Int8Task(Task):
    """As Task, with integer products.

    `work` f32[rows, block + 32 + dp]: scores or weights, 16 partial sums of weights, the maximum, the factor, the scale
    of the weights and that of the query, then the weighted sums of values. `query` i16[rows, d], `weights`
    i16[rows, block].
    """

    def __init__(
        self,
        chosen: Plan,
        scores: Scores,
        group: int,
        d: int,
        buffers: tuple[Any, ...],
        head: Expr,
        first: Expr,
        part: Expr,
        arch: str,
        lanes: int,
    ):
        q, keys, values, self.k_scale, self.v_scale, out = buffers
        super().__init__(chosen, scores, group, d, (q, keys, values, out), head, first, part)
        self.arch, self.lanes, self.line = arch, lanes, attention.CACHE_LINE_BYTES
        self.weight_scale, self.query_scale = self.factor + 1, self.factor + 2
        self.total = self.query  # column of work where Task keeps the query
        self.queries = T.alloc_buffer((self.rows, d), "int16", layout=None)
        self.weights = T.alloc_buffer((self.rows, chosen.block), "int16", layout=None)

    def _clear(self, r: Expr) -> None:
        """Nothing seen yet; the query rounded."""
        _, column = self.place(r)
        token, d = self.first + r // self.group, self.d
        T.buffer_store(self.work, T.float32(MASKED), [r, self.maximum])
        vector.store(self.work, vector.splat(0.0, LANES), r, self.sums, lanes=LANES)
        vector.sweep(-(-d // LANES) * LANES, self._clear_total(r))
        largest = vector.registers(1, 1)
        T.buffer_store(largest, T.float32(0), [0, 0])
        for c, lanes in vector.pieces(d):
            query = vector.absolute(vector.load(self.q, token, column + c, lanes=lanes), lanes)
            T.buffer_store(largest, T.max(largest[0, 0], vector.largest(query, lanes)), [0, 0])
        levels = float(min(LEVELS, ((1 << 31) - 1) // (INT8_LEVELS * d)))
        some = largest[0, 0] >= T.float32(SMALLEST)
        inverse = vector.hold(T.Select(some, T.float32(levels) / largest[0, 0], T.float32(0)), 1)
        scale = largest[0, 0] / T.float32(levels) * T.float32(self.scores.query_factor)
        T.buffer_store(self.work, T.Select(some, scale, T.float32(0)), [r, self.query_scale])
        for c, lanes in vector.pieces(d):
            scaled = vector.load(self.q, token, column + c, lanes=lanes) * vector.splat(inverse, lanes)
            vector.store(self.queries, vector.to_int32(scaled, lanes), r, c, lanes=lanes)

    def _clear_total(self, r: Expr) -> Any:
        return lambda c, lanes: vector.store(self.work, vector.splat(0.0, lanes), r, self.total + c, lanes=lanes)

    def _divide(self, r: Expr) -> None:
        """Weighted sum to weighted mean, in out."""
        sums = vector.total(vector.load(self.work, r, self.sums, lanes=LANES), LANES)
        self._write(r, vector.hold(T.float32(1) / sums, 1))

    def leave(self, stats: Any) -> None:
        """As Task, and the sums to the part's line."""
        super().leave(stats)
        with T.serial(self.rows) as r:
            self._write(r, T.float32(1))

    def _write(self, r: Expr, times: Expr) -> None:
        line, column = self.place(r)
        for c, lanes in vector.pieces(self.d):
            value = vector.load(self.work, r, self.total + c, lanes=lanes) * vector.splat(times, lanes)
            vector.store(self.out, value, line, column + c, lanes=lanes)

    def _dot(self, cell: Any, codes: Expr, pair: Expr) -> None:
        """cell i32[lanes] += products of int8 pairs and one repeated int16 pair."""
        product = vector.dot_pairs(codes, pair, self.lanes, self.arch)
        T.buffer_store(cell, cell[0, T.ramp(0, 1, self.lanes)] + product, [0, T.ramp(0, 1, self.lanes)])

    def _codes(self, cache: Any, *index: Expr) -> Expr:
        """Pairs of codes from `index` on, widened."""
        lanes = 2 * self.lanes
        wide = T.Cast(vector.kind("int16", lanes), cache[(*index[:-1], T.ramp(index[-1], 1, lanes))])
        return vector.hold(wide, lanes, "int16")

    def _integers(self) -> Any:
        cell = vector.registers(1, self.lanes, "int32")
        T.buffer_store(cell, T.broadcast(T.int32(0), self.lanes), [0, T.ramp(0, 1, self.lanes)])
        return cell

    def _scores(self, group: Sequence[Expr], start: Expr, base: Expr, j: Expr) -> None:
        """Scores of rows `group` at the block's j-th 16 positions, times log2 e, MASKED where they see too far."""
        chains, lanes, pairs = self.plan.key_chains, self.lanes, self.d // 2
        registers = range(LANES // lanes)
        sums = {(r, h, a): self._integers() for r in group for h in registers for a in range(chains)}
        unroll = attention.multiple(chains, 2, pairs)
        with T.serial(pairs // unroll) as c:
            for u in range(unroll):
                element = c * unroll + u
                if self._prefetches(group) and u % 2 == 0:
                    vector.prefetch(self.values, self._linear_values(base) + (j * pairs + element) * 2 * LANES)
                held = [self._codes(self.keys, self.head, base // LANES + j, element, h * 2 * lanes) for h in registers]
                for r in group:
                    pair = vector.hold(
                        vector.broadcast_pair(self.queries, r, 2 * element, lanes=lanes), 2 * lanes, "int16"
                    )
                    for h in registers:
                        self._dot(sums[r, h, u % chains], held[h], pair)
        for h in registers:
            begin = h * lanes
            scale = vector.hold(
                vector.load(self.k_scale, self.head, base + j * LANES + begin, lanes=lanes), lanes
            )
            for r in group:
                dot = reduce(add, [sums[r, h, a][0, T.ramp(0, 1, lanes)] for a in range(chains)])
                score = T.Cast(vector.kind("float32", lanes), dot) * (
                    scale * vector.splat(self.work[r, self.query_scale], lanes)
                )
                masked = self._masked(score, r, start, base + j * LANES + begin, lanes)
                vector.store(self.work, masked, r, j * LANES + begin, lanes=lanes)

    def _linear_values(self, position: Expr) -> Expr:
        """Bytes of the value cache before this head's `position`, which is even."""
        return (self.head * self.values.shape[1] + position // 2) * self.values.shape[2]

    def _softmax(self, r: Expr, base: Expr, vectors: Expr) -> None:
        """As Task, then weights * v_scale rounded to int16."""
        self.most = vector.registers(1)
        vector.store(self.most, vector.splat(0.0, LANES), 0, 0, lanes=LANES)
        super()._softmax(r, base, vectors)
        largest = vector.hold(vector.largest(vector.load(self.most, 0, 0, lanes=LANES), LANES), 1)
        some = largest >= T.float32(SMALLEST)
        inverse = vector.hold(T.Select(some, T.float32(LEVELS) / largest, T.float32(0)), 1)
        T.buffer_store(self.work, T.Select(some, largest / T.float32(LEVELS), T.float32(0)), [r, self.weight_scale])
        with T.serial(vectors) as j:
            scaled = vector.load(self.work, r, j * LANES, lanes=LANES) * vector.splat(inverse, LANES)
            # The sum has its last bit at 1, so it is rounded to an integer, half to even, in its low 16 bits.
            bits = T.reinterpret("int32x16", scaled + vector.splat(ROUNDS, LANES))
            vector.store(self.weights, bits, r, j * LANES, lanes=LANES)

    def _keep(self, r: Expr, base: Expr, j: Expr, weight: Expr) -> None:
        """Weights * v_scale, and the largest of them."""
        scale = vector.load(self.v_scale, self.head, base + j * LANES, lanes=LANES)
        scaled = vector.hold(weight * scale, LANES)
        super()._keep(r, base, j, scaled)
        most = T.max(vector.load(self.most, 0, 0, lanes=LANES), scaled)
        vector.store(self.most, most, 0, 0, lanes=LANES)

    def _values(self, group: Sequence[Expr], base: Expr, count: Expr) -> None:
        """total = total * factor + weights x V, for rows `group` over the block's `count` positions.

        An odd last position goes with the next one, whose weight is 0.
        """
        width = self.plan.value_vectors * self.lanes
        with T.serial(-(-self.d // LANES) * LANES // width) as part:
            columns = [part * width + v * self.lanes for v in range(self.plan.value_vectors)]
            cells = [(r, c, self._integers()) for r in group for c in columns]
            with T.serial((count + 1) // 2) as p:
                if self._prefetches(group):
                    for c in columns[:: max(1, self.line // (2 * self.lanes))]:
                        ahead = (self.head * self.values.shape[1] * 2 + base + self.plan.block + 2 * p) * self.d
                        vector.prefetch(self.keys, ahead + 2 * c)
                held = [self._codes(self.values, self.head, base // 2 + p, 2 * c) for c in columns]
                pairs = {
                    r: vector.hold(
                        vector.broadcast_pair(self.weights, r, 2 * p, lanes=self.lanes), 2 * self.lanes, "int16"
                    )
                    for r in group
                }
                for i, (r, _, cell) in enumerate(cells):
                    self._dot(cell, held[i % len(columns)], pairs[r])
            for r, c, cell in cells:
                dot = T.Cast(vector.kind("float32", self.lanes), cell[0, T.ramp(0, 1, self.lanes)])
                before = vector.load(self.work, r, self.total + c, lanes=self.lanes)
                after = before * vector.splat(self.work[r, self.factor], self.lanes) + dot * vector.splat(
                    self.work[r, self.weight_scale], self.lanes
                )
                vector.store(self.work, after, r, self.total + c, lanes=self.lanes)


def lower(request: Request) -> Kernel:
    """Tasks as in schedules.attention."""
    q_spec, k_spec, v_spec, scale_spec, _, _ = request.args
    heads, kv_heads, d = (int(request.attrs[key]) for key in ("heads", "kv_heads", "head_dim"))
    m, capacity, group = q_spec.shape[0], scale_spec.shape[1], heads // kv_heads
    chosen, scores = plan(request, m, kv_heads, group, d), attention.scores_of(request, d)
    target = request.target
    name = f"attention_int8_m{m}_h{heads}_kv{kv_heads}_d{d}_c{capacity}_{scores.name}_{chosen.name}"
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        q = T.arg("q", T.buffer((m, heads * d), "float32", layout=None))
        keys = T.arg("k_cache", T.buffer(k_spec.shape, "int8", layout=None))
        values = T.arg("v_cache", T.buffer(v_spec.shape, "int8", layout=None))
        k_scale = T.arg("k_scale", T.buffer(scale_spec.shape, "float32", layout=None))
        v_scale = T.arg("v_scale", T.buffer(scale_spec.shape, "float32", layout=None))
        span = T.arg("span", T.buffer((2,), "int32", layout=None))
        out = T.arg("out", T.buffer((m, heads * d), "float32", layout=None))

        def task(sums: Any, head: Expr, first: Expr, part: Expr) -> Task:
            buffers = (q, keys, values, k_scale, v_scale, sums)
            lanes = target.vector_bits // 32
            return Int8Task(chosen, scores, group, d, buffers, head, first, part, target.arch, lanes)

        with T.sblock("attention"):
            T.reads(
                q[0:m, 0 : heads * d],
                keys[0:kv_heads, 0 : k_spec.shape[1], 0 : d // 2, 0 : 2 * LANES],
                values[0:kv_heads, 0 : capacity // 2, 0 : v_spec.shape[2]],
                k_scale[0:kv_heads, 0:capacity],
                v_scale[0:kv_heads, 0:capacity],
                span[0:2],
            )
            T.writes(out[0:m, 0 : heads * d])
            attention.emit(chosen, scores, m, kv_heads, group, d, span, out, task)
    return Kernel(name, builder.get())


LOWERS = {"quern.attention_int8": lower}
