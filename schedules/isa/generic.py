"""Any LLVM target: a lane holds four bytes, so a shift, a mask and a 32-bit multiply-add serve every code of a lane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T

from schedules.isa import LANES

NAME = "generic"
NEEDS: tuple[str, ...] = ()
RANK = 0
VECTOR = LANES
KNOBS = {"row_blocks": 2, "unroll": 4, "prefetch_bytes": 0, "gemm_row_blocks": 1, "gemm_tokens": 4, "gemm_unroll": 1}


def step(bits: int, acc: Any, w: Any, a: Sequence[Any]) -> Any:
    """See schedules.isa.Isa. Little-endian: byte b of a lane is bits 8b..8b+7."""
    words = T.reinterpret(f"uint32x{VECTOR}", w)
    mask = T.broadcast(T.uint32((1 << bits) - 1), VECTOR)
    for h, quad in enumerate(a):
        for b in range(4):
            codes = T.bitwise_and(T.shift_right(words, T.broadcast(T.uint32(8 * b + bits * h), VECTOR)), mask)
            activation = T.shift_right(T.shift_left(quad, T.int32(24 - 8 * b)), T.int32(24))  # sign-extends byte b
            acc = acc + T.Cast(f"int32x{VECTOR}", codes) * T.broadcast(activation, VECTOR)
    return acc
