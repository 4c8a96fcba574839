"""AVX512-VNNI: VPDPBUSD multiplies 64 unsigned codes by 64 signed activations and adds them four by four, at once.

Exact: a product is at most 255 * 127, and thousands of them stay far below 2**31. Table grids: VPSHUFB turns 64 codes
into unsigned levels (level + 128), and the 128 leaves through the activation sum like any zero point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T

from schedules.isa import broadcast_quad, broadcast_table
from schedules.storage import Storage, Table, unpack

NAME = "avx512_vnni"
NEEDS = ("avx512f", "avx512bw", "avx512vl", "avx512vnni")
RANK = 30
VECTOR = 16
TABLE_ZERO = 128
PARTIAL = "int32"
BYTE_PLANES = 1
KNOBS = {
    "row_blocks": 8,
    "unroll": 16,
    "prefetch_bytes": 1024,
    # A thread reads one stream, which Zen 4 prefetches by itself: asking as well costs 1 to 10 %. 8 bits take so few
    # instructions that it falls behind: without asking 9 % are lost. Sapphire Rapids has not been measured since.
    "packed_prefetch_bytes": 0,
    "gemm_row_blocks": 1,  # each quad of activations is used once, so it is VPDPBUSD's memory operand: no load besides
    "gemm_tokens": 8,  # 8 accumulators and their fp32 sums: nothing is spilled
    "gemm_unroll": 16,
    "gemm_prefetch_bytes": 24576,  # a block's steps lie 512 bytes apart: 48 of them
    "unpacked_tokens": 8,  # accumulators and their fp32 sums: nothing is spilled
    "unpacked_quads": 32,  # any span
    "unpacked_asks": 4,  # with one, prompts of 2 to 4 tokens take 1.13 of the time; with 8, those of 64 take 1.05
    "unpacked_few": 8,
    "unpacked_span": 64,  # shorter ones lose 3 % (32)
}


def levels(table: Table, codes: Any) -> Any:
    """See schedules.isa.ByQuads."""
    found = T.call_llvm_pure_intrin("int8x64", "llvm.x86.avx512.pshuf.b.512", broadcast_table(table, VECTOR), codes)
    return T.reinterpret("uint8x64", found)


def multiply(partial: Any, codes: Any, quad: Any) -> Any:
    """See schedules.isa.ByQuads."""
    return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", partial, codes, quad)


def step(storage: Storage, table: Table | None, acc: Any, w: Sequence[Any], a: Sequence[Any]) -> Any:
    """See schedules.isa.Isa."""
    for codes, quad in zip(unpack(storage, w, VECTOR), a, strict=True):
        value = codes if table is None else levels(table, codes)
        acc = multiply(acc, value, broadcast_quad(quad, VECTOR))
    return acc
