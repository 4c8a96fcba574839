"""Causal attention over the cache, for one token or many, any number of query heads a kv head.

  quern.attention  q f32[m, heads * d], k_cache f16|f32[kv_heads, capacity/16, d, 16],
                   v_cache f16|f32[kv_heads, capacity, d], span i32[2]; heads, kv_heads, head_dim -> f32[m, heads * d]

Row t sees positions 0..span[0] + t; scores are scaled by 1/sqrt(d). Rows t >= span[1] are padding: what they get is not
defined. All arithmetic is fp32, the caches are storage only.

One task has one kv head and a tile of tokens; every (token, query head) of it is a row, so a key or value is loaded once
for all rows. It walks the context in blocks of `block` positions (online softmax, arXiv:2205.14135, in base 2):
  scores   row x 16 positions: the blocked k cache gives 16 keys' element d as one vector, so no sum crosses lanes
  softmax  new maximum, weights 2^(score - maximum), and the factor 2^(old - new) for what is summed so far
  values   out = out * factor + weights x V, the accumulators `out` itself
Scores live for one block only, so memory does not grow with the context.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import vector
from schedules.kernel import Kernel, Request
from schedules.vector import LANES, LOG2_E, Expr

MASKED = -1e30  # below any score of finite fp16 keys; 2^(MASKED - maximum) is exactly 0
ACCUMULATORS = {512: (8, 16), 256: (5, 4), 128: (5, 4)}  # vector_bits -> vectors of 16 kept by scores, by values


@dataclass(frozen=True)
class Plan:
    """Static decisions. Accumulators: key_rows x key_blocks vectors in `scores`, value_rows x value_vectors in `values`."""

    tile: int
    block: int
    key_rows: int
    key_blocks: int
    value_rows: int
    value_vectors: int

    @property
    def name(self) -> str:
        """Part of the kernel's name."""
        return f"t{self.tile}b{self.block}k{self.key_rows}x{self.key_blocks}v{self.value_rows}x{self.value_vectors}"


def plan(request: Request, m: int, group: int) -> Plan:
    """Default plan for `group` query heads a kv head, with the request's knobs put over it."""
    scores, values = ACCUMULATORS[request.target.vector_bits]
    tile = int(request.knobs.get("tile", max(t for t in range(1, m + 1) if m % t == 0 and (t == 1 or t * group <= 8))))
    rows = tile * group
    key_rows = len(next(balanced(rows, scores)))
    value_rows = len(next(balanced(rows, 4)))
    chosen = {
        "block": 128,
        "key_rows": key_rows,
        "key_blocks": max(1, scores // key_rows),
        "value_rows": value_rows,
        "value_vectors": max(1, values // value_rows),
    }
    return Plan(tile, **{key: int(request.knobs.get(key, default)) for key, default in chosen.items()})


def balanced(n: int, most: int) -> Iterator[range]:
    """0..n-1 in the fewest ranges of at most `most`, their sizes as equal as can be."""
    parts = -(-n // most)
    for i in range(parts):
        yield range(i * n // parts, (i + 1) * n // parts)[::1]


class Row(NamedTuple):
    """One query of a tile: its token, the first column of its head in q and out, and how many positions it sees."""

    token: Expr
    column: Expr
    sees: Expr


class Task:
    """Emits one task's code. `work` f32[rows, block + 32]: scores or weights, 16 partial sums, maximum, factor."""

    def __init__(self, chosen: Plan, d: int, buffers: tuple[Any, Any, Any, Any], head: Expr, rows: list[Row]):
        self.plan, self.d, self.head, self.rows = chosen, d, head, rows
        self.q, self.keys, self.values, self.out = buffers
        self.sums, self.maximum, self.factor = chosen.block, chosen.block + LANES, chosen.block + LANES + 1
        self.work = T.alloc_buffer((len(rows), chosen.block + 2 * LANES), "float32", layout=None)

    def emit(self, visible: Expr) -> None:
        """Attention over positions 0..visible-1."""
        block = self.plan.block
        for r, row in enumerate(self.rows):
            T.buffer_store(self.work, T.float32(MASKED), [r, self.maximum])
            vector.store(self.work, vector.splat(0.0, LANES), r, self.sums, lanes=LANES)
            for c, lanes in vector.pieces(self.d):
                vector.store(self.out, vector.splat(0.0, lanes), row.token, row.column + c, lanes=lanes)
        with T.serial((visible + (block - 1)) // block) as i:
            start = i * block
            count = vector.hold(T.min(visible - start, T.int32(block)), 1, "int32")
            vectors = vector.hold((count + (LANES - 1)) // LANES, 1, "int32")
            self._all_scores(start, vectors)
            with T.serial(len(self.rows)) as r:
                self._softmax(r, vectors)
            for group in balanced(len(self.rows), self.plan.value_rows):
                self._weighted_values(group, start, count)
        for r, row in enumerate(self.rows):
            total = vector.total(vector.load(self.work, r, self.sums, lanes=LANES), LANES)
            inverse = vector.hold(T.float32(1) / total, 1)
            for c, lanes in vector.pieces(self.d):
                scaled = vector.load(self.out, row.token, row.column + c, lanes=lanes) * vector.splat(inverse, lanes)
                vector.store(self.out, scaled, row.token, row.column + c, lanes=lanes)

    def _all_scores(self, start: Expr, vectors: Expr) -> None:
        """Scores of a block: key_blocks vectors at a time, the rest one by one."""
        at_once = self.plan.key_blocks
        for group in balanced(len(self.rows), self.plan.key_rows):
            if at_once > 1:
                with T.serial(vectors // at_once) as j:
                    self._scores(group, start, j * at_once, at_once)
                with T.serial(vectors % at_once) as j:
                    self._scores(group, start, vectors // at_once * at_once + j, 1)
            else:
                with T.serial(vectors) as j:
                    self._scores(group, start, j, 1)

    def _scores(self, group: range, start: Expr, first: Expr, at_once: int) -> None:
        """Scores of rows `group` for `at_once` vectors of 16 positions from vector `first` of the block."""
        sums = vector.registers(len(group) * at_once)
        for a in range(len(group) * at_once):
            vector.store(sums, vector.splat(0.0, LANES), a, 0, lanes=LANES)
        with T.serial(self.d) as c:
            for b in range(at_once):
                keys = vector.load(self.keys, self.head, start // LANES + first + b, c, 0, lanes=LANES)
                keys = vector.hold(keys, LANES)
                for i, r in enumerate(group):
                    a = i * at_once + b
                    product = vector.splat(self.q[self.rows[r].token, self.rows[r].column + c], LANES) * keys
                    vector.store(sums, vector.load(sums, a, 0, lanes=LANES) + product, a, 0, lanes=LANES)
        for i, r in enumerate(group):
            for b in range(at_once):
                scaled = vector.load(sums, i * at_once + b, 0, lanes=LANES) * vector.splat(LOG2_E / self.d**0.5, LANES)
                position = T.ramp(start + (first + b) * LANES, 1, LANES)
                seen = T.Select(position < T.broadcast(self.rows[r].sees, LANES), scaled, vector.splat(MASKED, LANES))
                vector.store(self.work, seen, r, (first + b) * LANES, lanes=LANES)

    def _softmax(self, r: Expr, vectors: Expr) -> None:
        """Row r's scores to weights; its maximum, sums and factor."""
        most = vector.registers(1)
        old = vector.hold(self.work[r, self.maximum], 1)
        vector.store(most, vector.splat(old, LANES), 0, 0, lanes=LANES)
        with T.serial(vectors) as j:
            larger = T.max(vector.load(most, 0, 0, lanes=LANES), vector.load(self.work, r, j * LANES, lanes=LANES))
            vector.store(most, larger, 0, 0, lanes=LANES)
        new = vector.largest(vector.load(most, 0, 0, lanes=LANES), LANES)
        factor = vector.hold(vector.exp2(old - new, 1), 1)
        T.buffer_store(self.work, new, [r, self.maximum])
        T.buffer_store(self.work, factor, [r, self.factor])
        sums = vector.registers(1)
        before = vector.load(self.work, r, self.sums, lanes=LANES) * vector.splat(factor, LANES)
        vector.store(sums, before, 0, 0, lanes=LANES)
        with T.serial(vectors) as j:
            score = vector.load(self.work, r, j * LANES, lanes=LANES)
            weight = vector.hold(vector.exp2(score - vector.splat(new, LANES), LANES), LANES)
            vector.store(self.work, weight, r, j * LANES, lanes=LANES)
            vector.store(sums, vector.load(sums, 0, 0, lanes=LANES) + weight, 0, 0, lanes=LANES)
        vector.store(self.work, vector.load(sums, 0, 0, lanes=LANES), r, self.sums, lanes=LANES)

    def _weighted_values(self, group: range, start: Expr, count: Expr) -> None:
        """out of rows `group` = out * factor + weights x V over the block's `count` positions."""
        pieces = list(vector.pieces(self.d))
        for part in balanced(len(pieces), self.plan.value_vectors):
            columns = [pieces[i] for i in part]
            cells = [(r, c, lanes, vector.registers(1, lanes)) for r in group for c, lanes in columns]
            for r, c, lanes, cell in cells:
                before = vector.load(self.out, self.rows[r].token, self.rows[r].column + c, lanes=lanes)
                factor = vector.splat(self.work[r, self.factor], lanes)
                vector.store(cell, before * factor, 0, 0, lanes=lanes)
            with T.serial(count) as p:
                held = {
                    c: vector.hold(vector.load(self.values, self.head, start + p, c, lanes=lanes), lanes)
                    for c, lanes in columns
                }
                for r, c, lanes, cell in cells:
                    product = vector.splat(self.work[r, p], lanes) * held[c]
                    vector.store(cell, vector.load(cell, 0, 0, lanes=lanes) + product, 0, 0, lanes=lanes)
            for r, c, lanes, cell in cells:
                done = vector.load(cell, 0, 0, lanes=lanes)
                vector.store(self.out, done, self.rows[r].token, self.rows[r].column + c, lanes=lanes)


def lower(request: Request) -> Kernel:
    """Tasks (kv head, tile of tokens) in parallel, heads outermost so that a thread keeps its head's cache."""
    q_spec, k_spec, v_spec, _ = request.args
    heads, kv_heads, d = (int(request.attrs[key]) for key in ("heads", "kv_heads", "head_dim"))
    m, capacity, group = q_spec.shape[0], v_spec.shape[1], heads // kv_heads
    chosen = plan(request, m, group)
    tiles = m // chosen.tile
    name = f"attention_{k_spec.dtype}_m{m}_h{heads}_kv{kv_heads}_d{d}_c{capacity}_{chosen.name}"
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        q = T.arg("q", T.buffer((m, heads * d), "float32", layout=None))
        keys = T.arg("k_cache", T.buffer(k_spec.shape, k_spec.dtype, layout=None))
        values = T.arg("v_cache", T.buffer(v_spec.shape, v_spec.dtype, layout=None))
        span = T.arg("span", T.buffer((2,), "int32", layout=None))
        out = T.arg("out", T.buffer((m, heads * d), "float32", layout=None))
        with T.sblock("attention"):
            T.reads(
                q[0:m, 0 : heads * d],
                keys[0:kv_heads, 0 : k_spec.shape[1], 0:d, 0:LANES],
                values[0:kv_heads, 0:capacity, 0:d],
                span[0:2],
            )
            T.writes(out[0:m, 0 : heads * d])
            with T.parallel(kv_heads * tiles) as i:
                first = vector.hold(i % tiles * chosen.tile, 1, "int32")
                with T.If(first < span[1]), T.Then():
                    head = vector.hold(i // tiles, 1, "int32")
                    rows = [
                        Row(first + t, (head * group + h) * d, span[0] + first + (t + 1))
                        for t in range(chosen.tile)
                        for h in range(group)
                    ]
                    visible = vector.hold(span[0] + T.min(first + chosen.tile, span[1]), 1, "int32")
                    Task(chosen, d, (q, keys, values, out), head, rows).emit(visible)
    return Kernel(name, builder.get())


LOWERS = {"quern.attention": lower}
