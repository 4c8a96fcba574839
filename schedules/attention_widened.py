"""Attention of a prompt over fp16 caches on arm64, where turning fp16 into fp32 costs half of a product: once a task.

The operator, the arithmetic and the frame are those of schedules.attention, which see. FCVTL takes a Cortex-A72 1.5
cycles for four numbers, an FMLA of four lanes 1. A task with more rows than have their scores made together would
convert every key and value for each such group of rows. Here they become fp32 in a buffer that stays in the first-level
cache, 16 keys or some columns of a block's values at a time, for all rows of the task; tiles have more tokens for it.
fp16 is exact in fp32, and the order of sums is the same: results equal those of schedules.attention to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tvm.script.ir_builder import tirx as T

from schedules import attention, vector
from schedules.attention import TASKS, Columns, Plan, Task, largest_divisor, multiple
from schedules.kernel import Kernel, NotSuited, Request, Space
from schedules.vector import LANES, Expr

RANK = 5  # asked before schedules.attention
MOST_ROWS = 32  # of a task: their queries, weights and the buffers are 24 KiB at d = 64, and most of a small L1
TOGETHER = 4  # rows: with 16 lanes each they have 16 of the 32 registers


class WidenedTask(Task):
    """As Task; `wide_keys` f32[d, 16], `wide_values` f32[block, columns that go together]."""

    def __init__(self, chosen: Plan, *rest: Any):
        super().__init__(chosen, *rest)
        self.wide_keys = T.alloc_buffer((self.d, LANES), "float32", layout=None)
        width = chosen.value_vectors * LANES
        self.wide_values = T.alloc_buffer((chosen.block, width), "float32", layout=None)

    def _prefetches(self, group: Sequence[Expr]) -> bool:
        """The loops that widen do it."""
        return False

    def _key(self, base: Expr, j: Expr, element: Expr) -> Expr:
        return vector.load(self.wide_keys, element, 0, lanes=LANES)

    def _value(self, base: Expr, p: Expr, columns: Columns, v: int) -> Expr:
        return vector.load(self.wide_values, p, sum(n for _, n in columns[:v]), lanes=columns[v][1])

    def _all_scores(self, start: Expr, base: Expr, vectors: Expr) -> None:
        """Scores of all rows with the block's positions, 16 at a time."""
        rows, unroll = self.plan.key_rows, multiple(1, self.line // LANES, self.d)
        with T.serial(vectors) as j:
            with T.serial(self.d // unroll) as c:
                for u in range(unroll):
                    element = c * unroll + u
                    if self.plan.prefetch and u * LANES % self.line == 0:
                        vector.prefetch(self.values, self._linear(base) + (j * self.d + element) * LANES)
                    vector.store(self.wide_keys, Task._key(self, base, j, element), element, 0, lanes=LANES)
            with T.serial(self.rows // rows) as g:
                self._scores([g * rows + i for i in range(rows)], start, base, j)

    def _all_softmax(self, base: Expr, vectors: Expr) -> None:
        """Some rows' maxima beside each other: each is a long chain of instructions that wait for the last."""
        rows = self.plan.key_rows
        with T.serial(self.rows // rows) as g:
            self._maxima([g * rows + i for i in range(rows)], vectors)
        with T.serial(self.rows) as r:
            new, factor = (vector.hold(self.work[r, place], 1) for place in (self.maximum, self.factor))
            self._weights(r, base, vectors, new, factor)

    def _all_values(self, base: Expr, count: Expr) -> None:
        """Weighted sums of all rows over the block's positions, some columns at a time."""
        rows = self.plan.value_rows

        def of_columns(columns: Columns) -> None:
            with T.serial(count) as p:
                if self.plan.prefetch:
                    vector.prefetch(self.keys, self._linear(base + (self.plan.block + p)) + columns[0][0])
                for v, (_, lanes) in enumerate(columns):
                    value = Task._value(self, base, p, columns, v)
                    vector.store(self.wide_values, value, p, sum(n for _, n in columns[:v]), lanes=lanes)
            with T.serial(self.rows // rows) as g:
                self._value_columns([g * rows + i for i in range(rows)], base, count, columns)

        self._by_columns(of_columns)


def plan(request: Request) -> Plan:
    """Default plan, with the request's knobs put over it. Raises NotSuited for what gains nothing here."""
    target, (m, _) = request.target, request.args[0].shape
    if target.arch != "aarch64" or not target.has("neon") or request.args[1].dtype != "float16":
        raise NotSuited
    heads, kv_heads, d = (int(request.attrs[key]) for key in ("heads", "kv_heads", "head_dim"))
    group = heads // kv_heads

    def fits(t: int) -> bool:
        return m % t == 0 and (t == 1 or (t * group <= MOST_ROWS and kv_heads * (m // t) >= TASKS))

    rows = int(request.knobs.get("tile", max(filter(fits, range(1, m + 1))))) * group
    together = largest_divisor(rows, TOGETHER)
    if not 1 < together < rows:
        raise NotSuited
    own = {
        "tile": rows // group,
        "key_rows": together,
        "key_chains": largest_divisor(d, TOGETHER // together),
        "value_rows": together,
        "value_vectors": largest_divisor(max(1, d // LANES), TOGETHER // together),
    }
    asked = replace(request, knobs=own | dict(request.knobs))
    return attention.plan(asked, m, kv_heads, group, d, 2)


def lower(request: Request) -> Kernel:
    """Tasks as in schedules.attention."""
    return attention.kernel(request, plan(request), "attention_widened", WidenedTask)


def space(request: Request) -> Space:
    """What tuning may try: rows that divide those of a task, and fewer than these."""
    group = int(request.attrs["heads"]) // int(request.attrs["kv_heads"])

    def shares(knobs: Mapping[str, int]) -> bool:
        rows = knobs["tile"] * group
        suited = 1 < largest_divisor(rows, TOGETHER) < rows
        return suited and all(rows % knobs[of] == 0 for of in ("key_rows", "value_rows"))

    return attention.space_around(request, plan(request), "attention_widened.neon", shares)


LOWERS = {"quern.attention": lower}
SPACES = {"quern.attention": space}
