"""NEON with dot products (Cortex-A76 and later): SDOT adds four products of bytes to each of four int32 lanes.

It takes four activations against 16 codes, four rows at a time. It wants both factors signed, and codes of up to 7 bits
are that already. 8-bit codes lose their 128 before (the highest bit flips), and get it back
as 128 times the sum of the activations, by one more SDOT with ones. Exact: no sum comes near 2**31. Levels of table
grids are signed; TBL looks 16 codes up at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T

from schedules.isa import broadcast_quad, broadcast_table
from schedules.storage import QUAD, Storage, Table, unpack

NAME = "neon_dotprod"
NEEDS = ("neon", "dotprod")
RANK = 20
VECTOR = 4
TABLE_ZERO = 0
KNOBS = {
    "row_blocks": 2, "unroll": 4, "prefetch_bytes": 0,
    "gemm_row_blocks": 1, "gemm_tokens": 4, "gemm_unroll": 4, "gemm_prefetch_bytes": 0,
}  # fmt: skip
BYTES = QUAD * VECTOR


def codes_or_levels(storage: Storage, table: Table | None, w: Sequence[Any]) -> list[Any]:
    """Of every quad of a step, u8 vectors [16]; a level is a signed byte."""
    codes = unpack(storage, w, VECTOR, shifts_bytes=True)
    if table is None:
        return codes
    levels = broadcast_table(table, VECTOR)
    return [T.call_llvm_pure_intrin("int8x16", "llvm.aarch64.neon.tbl1", levels, c) for c in codes]


def step(storage: Storage, table: Table | None, acc: Any, w: Sequence[Any], a: Sequence[Any]) -> Any:
    """See schedules.isa.Isa."""
    for value, quad in zip(codes_or_levels(storage, table, w), a, strict=True):
        x = broadcast_quad(quad, VECTOR)
        if storage.bits == 8:
            value = T.bitwise_xor(value, T.broadcast(T.uint8(128), BYTES))
            ones = T.broadcast(T.int8(1), BYTES)
            acc = acc + _dot(T.broadcast(T.int32(0), VECTOR), ones, x) * T.broadcast(T.int32(128), VECTOR)
        acc = _dot(acc, T.reinterpret("int8x16", value), x)
    return acc


def _dot(acc: Any, signed: Any, activations: Any) -> Any:
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot", acc, signed, activations)
