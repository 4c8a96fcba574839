"""Any LLVM target: a lane holds four bytes, so a shift, a mask and a 32-bit multiply-add serve every code of a lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.script import tirx as T

from schedules.storage import LANES, QUAD, Storage, Table, unpack

NAME = "generic"
NEEDS: tuple[str, ...] = ()
RANK = 0
VECTOR = LANES
TABLE_ZERO = 0
KNOBS = {
    "row_blocks": 2, "unroll": 4, "prefetch_bytes": 0,
    "gemm_row_blocks": 1, "gemm_tokens": 4, "gemm_unroll": 1, "gemm_prefetch_bytes": 0,
}  # fmt: skip


def _look_up(table: Table, codes: Any) -> Any:
    """Levels of codes, u8 vectors: a tree of choices, one level of it a bit of the code. Works on every target."""
    width = QUAD * VECTOR
    values = [T.broadcast(T.uint8(v & 255), width) for v in table]
    for bit in range(4):
        chosen = T.bitwise_and(codes, T.broadcast(T.uint8(1 << bit), width)) != T.broadcast(T.uint8(0), width)
        values = [T.Select(chosen, one, zero) for zero, one in zip(values[0::2], values[1::2], strict=True)]
    return values[0]


def dot(
    vector: int,
    look_up: Callable[[Table, Any], Any],
    storage: Storage,
    table: Table | None,
    acc: Any,
    w: Sequence[Any],
    a: Sequence[Any],
) -> Any:
    """`step` for vectors of any length and any way to look up. Little-endian: byte b of a lane is bits 8b..8b+7."""

    def splat(value: Any) -> Any:
        return T.broadcast(value, vector)

    def field(words: Any, place: int, bits: int) -> Any:
        return T.bitwise_and(T.shift_right(words, splat(T.uint32(place))), splat(T.uint32((1 << bits) - 1)))

    words = [T.reinterpret(f"uint32x{vector}", v) for v in w]
    ready: list[Any] = []  # whole codes or levels, a byte each
    if table is not None or storage.high:
        ready = [codes if table is None else look_up(table, codes) for codes in unpack(storage, w, vector)]
    for f, quad in enumerate(a):
        for b in range(QUAD):
            up = T.int32(24 - 8 * b)  # shifted up by this and down by 24, byte b is sign-extended
            if ready:  # a level is signed, and a code of two planes has at most 6 bits
                signed = T.shift_left(T.reinterpret(f"int32x{vector}", ready[f]), splat(up))
                weight = T.shift_right(signed, splat(T.int32(24)))
            else:
                place = 8 * b + f % storage.per_vector * storage.low
                weight = T.Cast(f"int32x{vector}", field(words[f // storage.per_vector], place, storage.low))
            activation = T.shift_right(T.shift_left(quad, up), T.int32(24))
            acc = acc + weight * splat(activation)
    return acc


def step(storage: Storage, table: Table | None, acc: Any, w: Sequence[Any], a: Sequence[Any]) -> Any:
    """See schedules.isa.Isa."""
    return dot(VECTOR, _look_up, storage, table, acc, w, a)
