"""Any LLVM target: a lane holds four bytes, so a shift, a mask and a 32-bit multiply-add serve every code of a lane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T

from schedules.storage import LANES, QUAD, Storage, Table, unpack

NAME = "generic"
NEEDS: tuple[str, ...] = ()
RANK = 0
VECTOR = LANES
TABLE_ZERO = 0
KNOBS = {"row_blocks": 2, "unroll": 4, "prefetch_bytes": 0, "gemm_row_blocks": 1, "gemm_tokens": 4, "gemm_unroll": 1}


def _look_up(table: Table, codes: Any) -> Any:
    """Levels of codes, u8 vectors: a tree of choices, one level of it a bit of the code. Works on every target."""
    width = QUAD * VECTOR
    values = [T.broadcast(T.uint8(v & 255), width) for v in table]
    for bit in range(4):
        chosen = T.bitwise_and(codes, T.broadcast(T.uint8(1 << bit), width)) != T.broadcast(T.uint8(0), width)
        values = [T.Select(chosen, one, zero) for zero, one in zip(values[0::2], values[1::2], strict=True)]
    return values[0]


def _byte(words: Any, b: int) -> Any:
    """Byte b of every 32-bit lane, sign-extended."""
    up, down = T.broadcast(T.int32(24 - 8 * b), VECTOR), T.broadcast(T.int32(24), VECTOR)
    return T.shift_right(T.shift_left(words, up), down)


def step(storage: Storage, table: Table | None, acc: Any, w: Sequence[Any], a: Sequence[Any]) -> Any:
    """See schedules.isa.Isa. Little-endian: byte b of a lane is bits 8b..8b+7."""
    words = [T.reinterpret(f"uint32x{VECTOR}", vector) for vector in w]

    def field(vector: Any, place: int, bits: int) -> Any:
        shifted = T.shift_right(vector, T.broadcast(T.uint32(place), VECTOR))
        return T.bitwise_and(shifted, T.broadcast(T.uint32((1 << bits) - 1), VECTOR))

    looked_up = [] if table is None else [_look_up(table, codes) for codes in unpack(storage, w, VECTOR)]
    for f, quad in enumerate(a):
        for b in range(QUAD):
            if table is not None:
                weight = _byte(T.reinterpret(f"int32x{VECTOR}", looked_up[f]), b)
            else:
                place = 8 * b + f % storage.per_vector * storage.low
                codes = field(words[f // storage.per_vector], place, storage.low)
                if storage.high:
                    above = field(words[-1], 8 * b + f * storage.high, storage.high)
                    codes = T.bitwise_or(codes, T.shift_left(above, T.broadcast(T.uint32(storage.low), VECTOR)))
                weight = T.Cast(f"int32x{VECTOR}", codes)
            activation = T.shift_right(T.shift_left(quad, T.int32(24 - 8 * b)), T.int32(24))  # sign-extends byte b
            acc = acc + weight * T.broadcast(activation, VECTOR)
    return acc
