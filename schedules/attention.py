"""Causal attention over the cache, for one token or many, any number of query heads a kv head.

  quern.attention  q f32[m, heads * d], k_cache f16|f32[kv_heads, capacity/16, d, 16],
                   v_cache f16|f32[kv_heads, capacity, d], span i32[2];
                   heads, kv_heads, head_dim, scale = 1/sqrt(d), softcap = 0, window = 0 -> f32[m, heads * d]

Row t, at position p = span[0] + t, sees positions 0..p, or with a window the `window` positions up to p. A score is
s = scale * q.k, with a soft cap softcap * tanh(s / softcap) (arXiv:2408.00118). 0 means none, and costs nothing. Rows
t >= span[1] are padding: what they get is not defined. All arithmetic is fp32, the caches are storage only.

One task has one kv head and a tile of tokens; every (token, query head) of it is a row, so a key or value is loaded
once for all rows. It walks the context in blocks of `block` positions (online softmax, arXiv:2205.14135, in base 2):
  scores   row x 16 positions: the blocked k cache gives 16 keys' element d as one vector, so no sum crosses lanes
  softmax  new maximum, weights 2^(score - maximum), and the factor 2^(old - new) for what is summed so far
  values   out = out * factor + weights x V, the accumulators `out` itself
Scores live for one block only, so memory does not grow with the context. Positions before the window of all rows are
skipped, 16 at a time. A row that sees nothing of its first blocks gathers weights 2^0 there, and drops them when its
first real score brings the factor 2^(MASKED - score) = 0.

A single token has no more tasks than kv heads. Where these do not fill TASKS threads evenly, what the token sees is
cut into `parts` equal ranges of 16 positions (flash decoding): each leaves its weighted sum, its maximum
and its sum of weights, and the caller's thread joins them. The number of parts follows from the shape alone,
never from the threads or the target, so neither changes a result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from math import gcd
from operator import add
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import vector
from schedules.kernel import Kernel, Request, Space, spelled
from schedules.vector import LANES, LOG2_E, Expr

Columns = list[tuple[Expr, int]]  # (first column, lanes) of vectors of V
MASKED = -1e30  # below any score of finite fp16 keys; 2^(MASKED - maximum) is exactly 0
# Accumulators, in vectors of 16 lanes, by vector_bits. For scores: what fits in registers; what hides the latency of a
# multiply-add. For values: with up to 3 rows, where reading whole lines of V beats a spill; with more, what fits.
ACCUMULATORS = {512: (8, 8, 16, 16), 256: (5, 4, 8, 4), 128: (5, 2, 5, 4)}
WIDEST = 512  # vector_bits with room for 16 rows of a prompt x 1 vector of V: a weight used once is a memory operand
CACHE_LINE_BYTES = 64
TASKS = 4  # threads that one token's attention shall fill evenly
BLOCK_BYTES = 16384  # keys of a block: half of a small L1; values take the other half


@dataclass(frozen=True)
class Scores:
    """What becomes of a product q.k: scaled, capped when `softcap` is not 0, masked before the window when that is."""

    scale: float
    softcap: float
    window: int

    @property
    def name(self) -> str:
        """Part of the kernel's name."""
        cap = f"_cap{spelled(self.softcap)}" if self.softcap else ""
        return f"x{spelled(self.scale)}{cap}" + (f"_w{self.window}" if self.window else "")

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by, so that a product is the exponent of 2 that comes next."""
        return LOG2_E * self.scale * (2 / self.softcap if self.softcap else 1)


@dataclass(frozen=True)
class Plan:
    """Static decisions, each a knob."""

    tile: int  # tokens a task handles together
    block: int  # positions between two corrections of the maximum, a multiple of 16
    key_rows: int  # rows whose scores are made together
    key_chains: int  # accumulators a row, each with every key_chains-th element of d
    value_rows: int  # rows whose values are summed together
    value_vectors: int  # vectors of 16 columns of V that go with them
    prefetch: int  # 1: reading keys asks for this block's values, reading values for the next block's keys
    parts: int = 1  # ranges of positions that a single token's context is cut into

    @property
    def name(self) -> str:
        """Part of the kernel's name."""
        tiles = f"k{self.key_rows}x{self.key_chains}v{self.value_rows}x{self.value_vectors}"
        return f"t{self.tile}b{self.block}{tiles}p{self.prefetch}" + (f"s{self.parts}" if self.parts > 1 else "")


def parts(m: int, kv_heads: int) -> int:
    """Ranges of positions a kv head: the fewest that make the tasks of one token a multiple of TASKS."""
    return 1 if m > 1 else TASKS // gcd(TASKS, kv_heads)


def plan(request: Request, m: int, kv_heads: int, group: int, d: int, item_bytes: int) -> Plan:
    """Default plan for `group` query heads a kv head, with the request's knobs put over it."""
    scores, chains, few, many = ACCUMULATORS[request.target.vector_bits]
    prompt = m > 1 and request.target.vector_bits == WIDEST
    most, together = (many, many) if prompt else (8, 4)
    tile = max(t for t in range(1, m + 1) if m % t == 0 and (t == 1 or t * group <= most))
    rows = int(request.knobs.get("tile", tile)) * group
    key_rows = len(balanced(rows, scores)[0])
    value_rows = len(balanced(rows, together)[0])
    chosen = {
        "tile": tile,
        "block": min(max(BLOCK_BYTES // (d * item_bytes) // LANES * LANES, 32), 256),
        "key_rows": key_rows,
        "key_chains": largest_divisor(d, max(1, chains // key_rows)),
        "value_rows": value_rows,
        "value_vectors": largest_divisor(max(1, d // LANES), max(1, (few if rows < 4 else many) // value_rows)),
        "prefetch": int(rows > 1),  # one row: the hardware's prefetcher keeps up, and the instructions cost
        "parts": parts(m, kv_heads),
    }
    return Plan(**{key: int(request.knobs.get(key, default)) for key, default in chosen.items()})


def largest_divisor(of: int, most: int) -> int:
    """Largest number up to `most` that divides `of`."""
    return next(n for n in range(min(of, most), 0, -1) if of % n == 0)


def multiple(of: int, least: int, divides: int) -> int:
    """Smallest multiple of `of` that is at least `least` and divides `divides`; `of` itself if there is none."""
    return next((n for n in range(of, divides + 1, of) if n >= least and divides % n == 0), of)


def balanced(n: int, most: int) -> list[range]:
    """0..n-1 in the fewest ranges of at most `most`, the longest first, their lengths as equal as can be."""
    parts = -(-n // most)
    return [range(-(-i * n // parts), -(-(i + 1) * n // parts)) for i in range(parts)]


class Task:
    """Emits one task: tokens first..first+tile-1 of one kv head. Row r is token r // group, query head r % group of it.

    `work` f32[rows, block + 32 + d]: a row's scores or weights, 16 partial sums of weights, the maximum and the factor,
    then the query times query_factor. A copy, because tokens lie a power of two apart and would share cache sets.
    """

    def __init__(
        self,
        chosen: Plan,
        scores: Scores,
        group: int,
        d: int,
        buffers: tuple[Any, Any, Any, Any],
        head: Expr,
        first: Expr,
        part: Expr = 0,
    ):
        self.plan, self.scores, self.group, self.d, self.head, self.first = chosen, scores, group, d, head, first
        self.q, self.keys, self.values, self.out = buffers
        self.part = part
        self.rows = chosen.tile * group
        self.line = CACHE_LINE_BYTES // (2 if self.keys.ty.dtype == "float16" else 4)
        self.sums, self.maximum, self.factor = chosen.block, chosen.block + LANES, chosen.block + LANES + 1
        self.query = chosen.block + 2 * LANES
        self.work = T.alloc_buffer((self.rows, self.query + -(-d // LANES) * LANES), "float32", layout=None)

    def place(self, r: Expr) -> tuple[Expr, Expr]:
        """Row r's line, and the first column of its head, in out: its token, or its part where there are several."""
        return self.part + self.first + r // self.group, (self.head * self.group + r % self.group) * self.d

    def _linear(self, position: Expr) -> Expr:
        """Elements of either cache before this head's `position`, each position counting d."""
        return (self.head * self.values.shape[1] + position) * self.d

    def emit(self, start: Expr, low: Expr, high: Expr) -> None:
        """Weighted sums over positions low..high-1 for tokens whose first one has position `start`; 16 divides low."""
        with T.serial(self.rows) as r:
            self._clear(r)
        with T.serial((high - low + (self.plan.block - 1)) // self.plan.block) as i:
            base = vector.hold(low + i * self.plan.block, 1, "int32")
            count = vector.hold(T.min(high - base, T.int32(self.plan.block)), 1, "int32")
            vectors = vector.hold((count + (LANES - 1)) // LANES, 1, "int32")
            self._all_scores(start, base, vectors)
            self._all_softmax(base, vectors)
            self._all_values(base, count)

    def _all_scores(self, start: Expr, base: Expr, vectors: Expr) -> None:
        """Scores of all rows with the block's positions, 16 at a time."""
        for group in balanced(self.rows, self.plan.key_rows):
            with T.serial(vectors) as j:
                self._scores(group, start, base, j)

    def _all_softmax(self, base: Expr, vectors: Expr) -> None:
        """Weights, maxima and factors of all rows."""
        with T.serial(self.rows) as r:
            self._softmax(r, base, vectors)

    def _all_values(self, base: Expr, count: Expr) -> None:
        """Weighted sums of all rows over the block's positions."""
        for group in balanced(self.rows, self.plan.value_rows):
            self._values(group, base, count)

    def _prefetches(self, group: Sequence[Expr]) -> bool:
        """Whether these rows are the ones that ask for what comes next."""
        return bool(self.plan.prefetch) and group[0] == 0

    def divide(self) -> None:
        """Weighted sums to weighted means."""
        with T.serial(self.rows) as r:
            self._divide(r)

    def leave(self, stats: Any) -> None:
        """Each row's maximum and sum of weights to stats[part, head], for `join`."""
        with T.serial(self.rows) as r:
            line, head = self.part, self.head * self.group + r
            T.buffer_store(stats, self.work[r, self.maximum], [line, head, 0])
            sums = vector.total(vector.load(self.work, r, self.sums, lanes=LANES), LANES)
            T.buffer_store(stats, sums, [line, head, 1])

    def _clear(self, r: Expr) -> None:
        """Nothing seen yet; the query scaled."""
        line, column = self.place(r)
        T.buffer_store(self.work, T.float32(MASKED), [r, self.maximum])
        vector.store(self.work, vector.splat(0.0, LANES), r, self.sums, lanes=LANES)
        for c, lanes in vector.pieces(self.d):
            vector.store(self.out, vector.splat(0.0, lanes), line, column + c, lanes=lanes)
            query = vector.load(self.q, self.first + r // self.group, column + c, lanes=lanes)
            scaled = query * vector.splat(self.scores.query_factor, lanes)
            vector.store(self.work, scaled, r, self.query + c, lanes=lanes)

    def _divide(self, r: Expr) -> None:
        """Weighted sum to weighted mean."""
        token, column = self.place(r)
        total = vector.total(vector.load(self.work, r, self.sums, lanes=LANES), LANES)
        inverse = vector.hold(T.float32(1) / total, 1)
        for c, lanes in vector.pieces(self.d):
            mean = vector.load(self.out, token, column + c, lanes=lanes) * vector.splat(inverse, lanes)
            vector.store(self.out, mean, token, column + c, lanes=lanes)

    def _scores(self, group: Sequence[Expr], start: Expr, base: Expr, j: Expr) -> None:
        """Scores of rows `group` at the block's j-th 16 positions, times log2 e, MASKED where they see too far."""
        chains = self.plan.key_chains
        sums = {(i, a): vector.registers(1) for i in range(len(group)) for a in range(chains)}
        for cell in sums.values():
            vector.store(cell, vector.splat(0.0, LANES), 0, 0, lanes=LANES)
        unroll = multiple(chains, self.line // LANES, self.d)
        with T.serial(self.d // unroll) as c:
            for u in range(unroll):
                element, a = c * unroll + u, u % chains
                if self._prefetches(group) and u * LANES % self.line == 0:
                    vector.prefetch(self.values, self._linear(base) + (j * self.d + element) * LANES)
                keys = vector.hold(self._key(base, j, element), LANES)
                for i, r in enumerate(group):
                    product = vector.splat(self.work[r, self.query + element], LANES) * keys
                    vector.store(sums[i, a], vector.load(sums[i, a], 0, 0, lanes=LANES) + product, 0, 0, lanes=LANES)
        for i, r in enumerate(group):
            score = reduce(add, [vector.load(sums[i, a], 0, 0, lanes=LANES) for a in range(chains)])
            masked = self._masked(score, r, start, base + j * LANES, LANES)
            vector.store(self.work, masked, r, j * LANES, lanes=LANES)

    def _key(self, base: Expr, j: Expr, element: Expr) -> Expr:
        """One element of the block's j-th 16 keys."""
        return vector.load(self.keys, self.head, base // LANES + j, element, 0, lanes=LANES)

    def _value(self, base: Expr, p: Expr, columns: Columns, v: int) -> Expr:
        """The v-th of some vectors of the block's p-th value."""
        column, lanes = columns[v]
        return vector.load(self.values, self.head, base + p, column, lanes=lanes)

    def _masked(self, score: Expr, r: Expr, start: Expr, first: Expr, lanes: int) -> Expr:
        """Products of row r with the keys of positions first.., capped, and MASKED where the row does not see them."""
        if self.scores.softcap:
            score = vector.tanh2(score, lanes) * vector.splat(self.scores.softcap * LOG2_E, lanes)
        position, masked = T.ramp(first, 1, lanes), vector.splat(MASKED, lanes)
        own = start + r // self.group
        if self.scores.window:
            score = T.Select(position > vector.splat(own - self.scores.window, lanes), score, masked)
        return T.Select(position <= vector.splat(own, lanes), score, masked)

    def _softmax(self, r: Expr, base: Expr, vectors: Expr) -> None:
        """Row r's scores of the positions from `base` on to weights; its maximum, sums and factor."""
        ((new, factor),) = self._maxima([r], vectors)
        self._weights(r, base, vectors, new, factor)

    def _maxima(self, rows: Sequence[Expr], vectors: Expr) -> list[tuple[Expr, Expr]]:
        """Rows' new maxima, and the factors for what is summed so far."""
        most = [vector.registers(1) for _ in rows]
        old = [vector.hold(self.work[r, self.maximum], 1) for r in rows]
        for cell, before in zip(most, old, strict=True):
            vector.store(cell, vector.splat(before, LANES), 0, 0, lanes=LANES)
        with T.serial(vectors) as j:
            for cell, r in zip(most, rows, strict=True):
                larger = T.max(vector.load(cell, 0, 0, lanes=LANES), vector.load(self.work, r, j * LANES, lanes=LANES))
                vector.store(cell, larger, 0, 0, lanes=LANES)
        found = []
        for cell, before, r in zip(most, old, rows, strict=True):
            new = vector.largest(vector.load(cell, 0, 0, lanes=LANES), LANES)
            factor = vector.hold(vector.exp2(before - new, 1), 1)
            T.buffer_store(self.work, new, [r, self.maximum])
            T.buffer_store(self.work, factor, [r, self.factor])
            found.append((new, factor))
        return found

    def _weights(self, r: Expr, base: Expr, vectors: Expr, new: Expr, factor: Expr) -> None:
        """Row r's scores to weights, and their sums."""
        sums = vector.registers(1)
        before = vector.load(self.work, r, self.sums, lanes=LANES) * vector.splat(factor, LANES)
        vector.store(sums, before, 0, 0, lanes=LANES)
        with T.serial(vectors) as j:
            score = vector.load(self.work, r, j * LANES, lanes=LANES)
            weight = vector.hold(vector.exp2(score - vector.splat(new, LANES), LANES), LANES)
            self._keep(r, base, j, weight)
            vector.store(sums, vector.load(sums, 0, 0, lanes=LANES) + weight, 0, 0, lanes=LANES)
        vector.store(self.work, vector.load(sums, 0, 0, lanes=LANES), r, self.sums, lanes=LANES)

    def _keep(self, r: Expr, base: Expr, j: Expr, weight: Expr) -> None:
        """Row r's weights of the j-th 16 positions from `base` on, for `_values`."""
        vector.store(self.work, weight, r, j * LANES, lanes=LANES)

    def _values(self, group: Sequence[Expr], base: Expr, count: Expr) -> None:
        """out = out * factor + weights x V, for rows `group` over the block's `count` positions."""
        self._by_columns(lambda columns: self._value_columns(group, base, count, columns))

    def _by_columns(self, body: Callable[[Columns], None]) -> None:
        """body(vectors that go together) for all of d.

        A loop over the columns, though they are few: with constant addresses LLVM would keep all of `out` in registers
        over the whole context, and spill.
        """
        width = self.plan.value_vectors * LANES
        whole = self.d - self.d % width
        if whole:
            with T.serial(whole // width) as part:
                body([(part * width + v * LANES, LANES) for v in range(self.plan.value_vectors)])
        if whole < self.d:
            body([(whole + c, lanes) for c, lanes in vector.pieces(self.d - whole)])

    def _value_columns(self, group: Sequence[Expr], base: Expr, count: Expr, columns: Columns) -> None:
        """As `_values`, for some columns; each (row, vector) has an accumulator."""
        cells = [(r, v, vector.registers(1, lanes)) for r in group for v, (_, lanes) in enumerate(columns)]
        for r, v, cell in cells:
            (token, column), (c, lanes) = self.place(r), columns[v]
            before = vector.load(self.out, token, column + c, lanes=lanes)
            vector.store(cell, before * vector.splat(self.work[r, self.factor], lanes), 0, 0, lanes=lanes)
        with T.serial(count) as p:
            if self._prefetches(group):
                for c, _ in columns[:: max(1, self.line // LANES)]:
                    vector.prefetch(self.keys, self._linear(base + (self.plan.block + p)) + c)
            held = [vector.hold(self._value(base, p, columns, v), lanes) for v, (_, lanes) in enumerate(columns)]
            for r, v, cell in cells:
                lanes = columns[v][1]
                product = vector.splat(self.work[r, p], lanes) * held[v]
                vector.store(cell, vector.load(cell, 0, 0, lanes=lanes) + product, 0, 0, lanes=lanes)
        for r, v, cell in cells:
            (token, column), (c, lanes) = self.place(r), columns[v]
            vector.store(self.out, vector.load(cell, 0, 0, lanes=lanes), token, column + c, lanes=lanes)


def join(partial: Any, stats: Any, out: Any, count: int, heads: int, d: int) -> None:
    """out[0, head] = weighted mean over all parts: sums partial[part, head], (maximum, weights) stats[part, head]."""
    factors = vector.registers(count, 1)
    with T.serial(heads) as h:
        most = vector.hold(reduce(T.max, [stats[p, h, 0] for p in range(count)]), 1)
        for p in range(count):
            T.buffer_store(factors, vector.exp2(stats[p, h, 0] - most, 1), [p, 0])
        total = reduce(add, [factors[p, 0] * stats[p, h, 1] for p in range(count)])
        inverse = vector.hold(T.float32(1) / total, 1)
        for c, lanes in vector.pieces(d):
            terms = [
                vector.splat(factors[p, 0], lanes) * vector.load(partial, p, h * d + c, lanes=lanes)
                for p in range(count)
            ]
            mean = reduce(add, terms) * vector.splat(inverse, lanes)
            vector.store(out, mean, 0, h * d + c, lanes=lanes)


def emit(
    chosen: Plan, scores: Scores, m: int, kv_heads: int, group: int, d: int, span: Any, out: Any,
    task: Callable[[Any, Expr, Expr, Expr], Task],
) -> None:  # fmt: skip
    """All tasks of a call; task(where sums go, kv head, first token, part) makes one."""
    count, tile = chosen.parts, chosen.tile
    assert count == 1 or m == 1, chosen
    tiles = (span[1] + (tile - 1)) // tile if m > 1 else 1  # those with real rows
    heads, split = kv_heads * group, count > 1
    partial = T.alloc_buffer((count, heads * d), "float32", layout=None) if split else out
    stats = T.alloc_buffer((count, heads, 2), "float32", layout=None) if split else None
    with T.parallel(kv_heads * tiles * count) as i:
        first = vector.hold(i // count % tiles * tile, 1, "int32")
        with T.If(first < span[1]), T.Then():
            head, part = vector.hold(i // count // tiles, 1, "int32"), i % count
            start, low = span[0] + first, T.int32(0)
            if scores.window:
                low = vector.hold(T.max(start - (scores.window - 1), T.int32(0)) // LANES, 1, "int32")
            high = vector.hold(span[0] + T.min(first + tile, span[1]), 1, "int32")
            made = task(partial, head, first, part if split else 0)
            if not split:
                made.emit(start, low * LANES, high)
                made.divide()
            else:
                vectors = (high + (LANES - 1)) // LANES - low
                begin = vector.hold((low + part * vectors // count) * LANES, 1, "int32")
                end = vector.hold(T.min((low + (part + 1) * vectors // count) * LANES, high), 1, "int32")
                made.emit(start, begin, end)
                made.leave(stats)
    if split:
        join(partial, stats, out, count, heads, d)


def scores_of(request: Request, d: int) -> Scores:
    """What the attributes say of scores."""
    attrs = request.attrs
    return Scores(
        float(attrs.get("scale", d**-0.5)), float(attrs.get("softcap", 0)), int(attrs.get("window", 0))
    )


def lower(request: Request) -> Kernel:
    """Tasks (kv head, tile of tokens, part) in parallel, heads outermost so that a thread keeps its head's cache."""
    heads, kv_heads, d = (int(request.attrs[key]) for key in ("heads", "kv_heads", "head_dim"))
    m, item_bytes = request.args[0].shape[0], 2 if request.args[1].dtype == "float16" else 4
    return kernel(request, plan(request, m, kv_heads, heads // kv_heads, d, item_bytes), "attention", Task)


def kernel(request: Request, chosen: Plan, family: str, made: type[Task]) -> Kernel:
    """The kernel of all tasks of one kind."""
    q_spec, k_spec, v_spec, _ = request.args
    heads, kv_heads, d = (int(request.attrs[key]) for key in ("heads", "kv_heads", "head_dim"))
    m, capacity, group = q_spec.shape[0], v_spec.shape[1], heads // kv_heads
    scores = scores_of(request, d)
    name = f"{family}_{k_spec.dtype}_m{m}_h{heads}_kv{kv_heads}_d{d}_c{capacity}_{scores.name}_{chosen.name}"
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        q = T.arg("q", T.buffer((m, heads * d), "float32", layout=None))
        keys = T.arg("k_cache", T.buffer(k_spec.shape, k_spec.dtype, layout=None))
        values = T.arg("v_cache", T.buffer(v_spec.shape, v_spec.dtype, layout=None))
        span = T.arg("span", T.buffer((2,), "int32", layout=None))
        out = T.arg("out", T.buffer((m, heads * d), "float32", layout=None))

        def task(sums: Any, head: Expr, first: Expr, part: Expr) -> Task:
            return made(chosen, scores, group, d, (q, keys, values, sums), head, first, part)

        with T.sblock("attention"):
            T.reads(
                q[0:m, 0 : heads * d],
                keys[0:kv_heads, 0 : k_spec.shape[1], 0:d, 0:LANES],
                values[0:kv_heads, 0:capacity, 0:d],
                span[0:2],
            )
            T.writes(out[0:m, 0 : heads * d])
            emit(chosen, scores, m, kv_heads, group, d, span, out, task)
    return Kernel(name, builder.get())


def space(request: Request) -> Space:
    """What tuning may try. The best block and accumulators depend on registers and caches, not on the scale."""
    m, item = request.args[0].shape[0], request.args[1].dtype
    heads, kv_heads, d = (int(request.attrs[key]) for key in ("heads", "kv_heads", "head_dim"))
    default = plan(request, m, kv_heads, heads // kv_heads, d, 2 if item == "float16" else 4)
    return space_around(request, default, f"attention.v{request.target.vector_bits}", lambda _: True)


def space_around(
    request: Request, chosen: Plan, schedule: str, also: Callable[[Mapping[str, int]], bool]
) -> Space:  # fmt: skip
    """Plans that a family of this frame may try; `also` is what else it asks of a point."""
    (m, _), item = request.args[0].shape, request.args[1].dtype
    heads, kv_heads, d = (int(request.attrs[key]) for key in ("heads", "kv_heads", "head_dim"))
    group = heads // kv_heads

    def allowed(knobs: Mapping[str, int]) -> bool:
        rows = knobs["tile"] * group
        fits = knobs["key_rows"] * knobs["key_chains"] <= 32 and knobs["value_rows"] * knobs["value_vectors"] <= 32
        return fits and knobs["key_rows"] <= rows and knobs["value_rows"] <= rows and rows <= 32 and also(knobs)

    tried = {
        "tile": tuple(t for t in (1, 2, 4, 8, 16) if m % t == 0),
        "block": (32, 64, 128, 256),
        "key_rows": (1, 2, 4, 8),
        "key_chains": tuple(c for c in (1, 2, 4, 8) if d % c == 0),
        "value_rows": (1, 2, 4, 8),
        "value_vectors": tuple(v for v in (1, 2, 4) if max(1, d // LANES) % v == 0),
        "prefetch": (0, 1),
        "parts": (1, 2, 4, 8) if m == 1 else (),
    }
    window, capacity = int(request.attrs.get("window", 0)), request.args[2].shape[1]
    workload: dict[str, int | str] = {"m": m, "heads": heads, "kv_heads": kv_heads, "head_dim": d}
    workload |= {"capacity": capacity, "cache": item, "window": window}
    return Space.around(asdict(chosen), tried, schedule=schedule, workload=workload, allowed=allowed)


LOWERS = {"quern.attention": lower}
SPACES = {"quern.attention": space}
