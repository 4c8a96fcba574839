"""AVX-VNNI (Alder Lake and later, no AVX-512): the same VPDPBUSD on 256-bit registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T

from schedules.isa import broadcast_quad, field

NAME = "avx_vnni"
NEEDS = ("avx2", "avxvnni")
RANK = 20
VECTOR = 8
KNOBS = {
    "row_blocks": 4,
    "unroll": 16,
    "prefetch_bytes": 1024,
    "gemm_row_blocks": 1,
    "gemm_tokens": 4,
    "gemm_unroll": 1,
}


def step(bits: int, acc: Any, w: Any, a: Sequence[Any]) -> Any:
    """See schedules.isa.Isa."""
    for h, quad in enumerate(a):
        acc = T.call_llvm_pure_intrin(
            "int32x8", "llvm.x86.avx512.vpdpbusd.256", acc, field(w, bits, h, VECTOR), broadcast_quad(quad, VECTOR)
        )
    return acc
