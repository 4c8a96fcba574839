"""AVX-VNNI (Alder Lake and later, no AVX-512): the same VPDPBUSD on 256-bit registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T

from schedules.isa import broadcast_quad, broadcast_table
from schedules.storage import Storage, Table, unpack

NAME = "avx_vnni"
NEEDS = ("avx2", "avxvnni")
RANK = 20
VECTOR = 8
TABLE_ZERO = 128
PARTIAL = "int32"
BYTE_PLANES = 1
KNOBS = {
    "row_blocks": 4,
    "unroll": 4,
    "prefetch_bytes": 1024,
    "gemm_row_blocks": 1,
    "gemm_tokens": 4,
    "gemm_unroll": 2,
    "gemm_prefetch_bytes": 16384,  # a block's steps lie 256 bytes apart: 64 of them
    "unpacked_tokens": 4,  # as with AVX2, not measured
    "unpacked_quads": 8,
    "unpacked_asks": 1,
    "unpacked_few": 4,
    "unpacked_span": 64,
}


def levels(table: Table, codes: Any) -> Any:
    """See schedules.isa.ByQuads."""
    found = T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.pshuf.b", broadcast_table(table, VECTOR), codes)
    return T.reinterpret("uint8x32", found)


def multiply(partial: Any, codes: Any, quad: Any) -> Any:
    """See schedules.isa.ByQuads."""
    return T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx512.vpdpbusd.256", partial, codes, quad)


def step(storage: Storage, table: Table | None, acc: Any, w: Sequence[Any], a: Sequence[Any]) -> Any:
    """See schedules.isa.Isa."""
    for codes, quad in zip(unpack(storage, w, VECTOR), a, strict=True):
        value = codes if table is None else levels(table, codes)
        acc = multiply(acc, value, broadcast_quad(quad, VECTOR))
    return acc
