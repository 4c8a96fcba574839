"""AVX2: VPMADDUBSW makes int16 sums of two products, VPMADDWD with ones makes int32 sums of four.

VPMADDUBSW saturates at 2**15, so it may only meet 4-bit fields: two fields of two products are at most
2 * 2 * 15 * 127 = 7620. An 8-bit code is therefore taken as two 4-bit fields, and the high one is weighed by 16 in
VPMADDWD: exact for every code and activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T

from schedules.isa import broadcast_quad, field

NAME = "avx2"
NEEDS = ("avx2",)
RANK = 10
VECTOR = 8
KNOBS = {
    "row_blocks": 2,
    "unroll": 16,
    "prefetch_bytes": 1024,
    "gemm_row_blocks": 1,
    "gemm_tokens": 4,
    "gemm_unroll": 1,
}


def _pairs(codes: Any, quad: Any) -> Any:
    return T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", codes, broadcast_quad(quad, VECTOR))


def _quads(pairs: Any, weight: int) -> Any:
    return T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, T.broadcast(T.int16(weight), 16))


def step(bits: int, acc: Any, w: Any, a: Sequence[Any]) -> Any:
    """See schedules.isa.Isa."""
    low, high = field(w, 4, 0, VECTOR), field(w, 4, 1, VECTOR)
    if bits == 8:
        return acc + _quads(_pairs(low, a[0]), 1) + _quads(_pairs(high, a[0]), 16)
    return acc + _quads(_pairs(low, a[0]) + _pairs(high, a[1]), 1)
