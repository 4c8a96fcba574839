"""Codes of 3, 5 and 6 bits in whole bytes: some codes lie in one piece at a byte's ends, others fill what is left.

Storage (schedules.storage) keeps such codes in two planes, which costs shift, mask, shift, mask, OR for each. Here most
codes need one instruction, and SLI (shift left and insert) puts the others together: 14 instructions for 8 codes of 3
or 5 bits, 6 for 4 codes of 6 bits. Bytes and bits are as many as with two planes.

PLACES[bits][code] lists pieces (byte, lowest bit there, bits), the code's lowest bits first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm.script import tirx as T

Piece = tuple[int, int, int]
PLACES: dict[int, tuple[tuple[Piece, ...], ...]] = {
    3: (
        ((0, 0, 3),), ((0, 5, 3),), ((1, 0, 3),), ((1, 5, 3),), ((2, 0, 3),), ((2, 5, 3),),
        ((0, 3, 2), (2, 3, 1)), ((1, 3, 2), (2, 4, 1)),
    ),
    5: (
        ((0, 3, 5),), ((1, 3, 5),), ((2, 3, 5),), ((3, 3, 5),), ((4, 3, 5),),
        ((0, 0, 3), (1, 0, 2)), ((2, 0, 3), (3, 0, 2)), ((4, 0, 3), (1, 2, 1), (3, 2, 1)),
    ),
    6: (((0, 2, 6),), ((1, 2, 6),), ((2, 2, 6),), ((0, 0, 2), (1, 0, 2), (2, 0, 2))),
}  # fmt: skip


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """u8[a, b, codes, ...] -> u8[a, b, bytes, ...]."""
    places = PLACES[bits]
    assert codes.shape[2] == len(places)
    packed = np.zeros((*codes.shape[:2], len(places) * bits // 8, *codes.shape[3:]), np.uint8)
    for f, pieces in enumerate(places):
        taken = 0
        for byte, at, count in pieces:
            piece = codes[:, :, f] >> np.uint8(taken) & np.uint8((1 << count) - 1)
            packed[:, :, byte] |= piece << np.uint8(at)
            taken += count
    return packed


def unpack(bits: int, b: Sequence[Any]) -> list[Any]:
    """Codes as u8 vectors [16], from the bytes' vectors. For NEON."""
    if bits == 3:
        ends = [part for byte in b for part in (_and(byte, 7), _right(byte, 5))]
        middle = _insert(_right(b[0], 3), _right(b[2], 3), 2), _insert(_right(b[1], 3), _right(b[2], 4), 2)
        return [*ends, *(_and(m, 7) for m in middle)]
    if bits == 5:
        rest = [_insert(b[0], b[1], 3), _insert(b[2], b[3], 3)]
        rest.append(_insert(b[4], _insert(_right(b[1], 2), _right(b[3], 2), 1), 3))
        return [*(_right(byte, 3) for byte in b), *(_and(r, 31) for r in rest)]
    assert bits == 6
    return [*(_right(byte, 2) for byte in b), _and(_insert(_insert(b[0], b[1], 2), b[2], 4), 63)]


def _right(value: Any, by: int) -> Any:
    return T.shift_right(value, T.broadcast(T.uint8(by), 16))


def _and(value: Any, mask: int) -> Any:
    return T.bitwise_and(value, T.broadcast(T.uint8(mask), 16))


def _insert(low: Any, high: Any, at: int) -> Any:
    """SLI: the lowest `at` bits of `low`, and `high` from there on."""
    return T.call_llvm_pure_intrin("uint8x16", "llvm.aarch64.neon.vsli", low, high, T.int32(at))
