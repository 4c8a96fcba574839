"""AVX2: VPMADDUBSW makes int16 sums of two products, VPMADDWD with ones makes int32 sums of four.

VPMADDUBSW saturates at 2**15 - 1 = 32767, and so would a sum of its results. With codes below 2**bits and activations
within +-127 one result is at most 2 * (2**bits - 1) * 127:
    bits 2: 762    3: 1778    4: 3810    5: 7874    6: 16002    8: 64770
so SUMS[bits] = 32767 // that many results are added in int16 before VPMADDWD (two for 6 bits: 32004). An 8-bit code is
taken as two 4-bit fields, of which VPMADDWD weighs the high one by 16. A level of a table grid is signed and within
+-127: |level| times (activation with the level's sign, VPSIGNB) is the same product, and two of them are at most
2 * 127 * 127 = 32258: no saturation, but no room for a second result. -activation exists because -128 never occurs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

from tvm.script import tirx as T

from schedules.isa import broadcast_quad, broadcast_table
from schedules.storage import Storage, Table, unpack

NAME = "avx2"
NEEDS = ("avx2",)
RANK = 10
VECTOR = 8
TABLE_ZERO = 0
PARTIAL = "int16"
BYTE_PLANES = 2
KNOBS = {
    "row_blocks": 4,
    "unroll": 4,
    "prefetch_bytes": 1024,
    "gemm_row_blocks": 1,
    "gemm_tokens": 4,
    "gemm_unroll": 2,
    "gemm_prefetch_bytes": 16384,  # a block's steps lie 256 bytes apart: 64 of them
    "unpacked_tokens": 4,  # with two registers of rows 8 partial sums: with codes and a quad 13 of 16 registers
    "unpacked_quads": 16,
    "unpacked_asks": 1,
    "unpacked_few": 4,
    "unpacked_span": 32,
}


SUMS = {bits: 32767 // (2 * ((1 << bits) - 1) * 127) for bits in (2, 3, 4, 5, 6)}


def _pairs(codes: Any, activations: Any) -> Any:
    return T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", codes, activations)


def _quads(pairs: Any, weight: int = 1) -> Any:
    return T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, T.broadcast(T.int16(weight), 16))


def _by_table(table: Table, codes: Any, activations: Any) -> Any:
    """int32 sums of four products of levels and activations, as the docstring proves them exact."""
    levels = T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.pshuf.b", broadcast_table(table, VECTOR), codes)
    sizes = broadcast_table(tuple(abs(v) for v in table), VECTOR)
    sizes = T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.pshuf.b", sizes, codes)
    signed = T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", activations, levels)
    return _quads(_pairs(sizes, signed))


def held(bits: int) -> int:
    """See schedules.isa.ByQuads."""
    return 1 << SUMS[bits].bit_length() - 1


def multiply(partial: Any, codes: Any, quad: Any) -> Any:
    """See schedules.isa.ByQuads."""
    return partial + _pairs(codes, quad)


def gather(partial: Any, plane: int) -> Any:
    """See schedules.isa.ByQuads."""
    return _quads(partial, 16**plane)


def step(storage: Storage, table: Table | None, acc: Any, w: Sequence[Any], a: Sequence[Any]) -> Any:
    """See schedules.isa.Isa."""
    activations = [broadcast_quad(quad, VECTOR) for quad in a]
    if storage.bits == 8:
        low, high = unpack(Storage(4), w, VECTOR)
        return acc + _quads(_pairs(low, activations[0])) + _quads(_pairs(high, activations[0]), 16)
    codes = unpack(storage, w, VECTOR)
    if table is not None:
        return sum((_by_table(table, c, x) for c, x in zip(codes, activations, strict=True)), acc)
    products = [_pairs(c, x) for c, x in zip(codes, activations, strict=True)]
    most = SUMS[storage.bits]
    return sum((_quads(reduce(add, products[i : i + most])) for i in range(0, len(products), most)), acc)
