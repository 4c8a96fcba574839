"""Bit fields in 32-bit words: b-bit codes as one little-endian stream along an axis, the first code in the lowest bits.

2, 4 and 8 bits fill each word with whole codes; 3 bits put 32 codes in 3 words, and two of them straddle a border.
"""
from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FIELD_BITS = (2, 3, 4, 8)
BLOCK_CODES = 1 << 19  # codes unpacked at a time: the working buffers stay in cache


def words_for(count: int, bits: int) -> int | None:
    """32-bit words that hold `count` codes, or None when they do not fill whole words."""
    return None if count * bits % 32 else count * bits // 32


def unpack(words: NDArray[np.int32], bits: int, axis: int) -> NDArray[np.uint8]:
    """i32[..., w, ...] -> u8[..., w * 32 / bits, ...] along `axis`. A transposed view of the words costs no extra copy.

    Works block by block over the first remaining axis, so that beside the result only BLOCK_CODES are held.
    """
    assert bits in FIELD_BITS, bits
    assert words.dtype.itemsize == 4, words.dtype
    assert words.shape[axis] * 32 % bits == 0, (words.shape, axis, bits)
    moved = np.moveaxis(words, axis, -1)
    count = moved.shape[-1] * 32 // bits
    rows = moved.reshape(-1, moved.shape[-1]) if moved.ndim != 2 else moved
    out = np.empty((rows.shape[0], count), np.uint8)
    step = max(1, BLOCK_CODES // max(1, count))
    turned = rows.strides[0] < rows.strides[1]
    for start in range(0, rows.shape[0], step):
        part = rows[start:start + step]
        if turned:  # gather whole lines first: fetching words that lie 16 KiB apart one by one takes twice as long
            part = np.ascontiguousarray(part.T).T
        block = np.ascontiguousarray(part).view(np.uint8)
        if bits == 4:
            _split_nibbles(block, out[start:start + step].view("<u2"))
        else:
            out[start:start + step].view("<u4")[:] = _spread(_quads(block, bits), bits)
    return np.moveaxis(out.reshape(*moved.shape[:-1], count), -1, axis)


def pack(codes: NDArray[np.uint8], bits: int, axis: int) -> NDArray[np.int32]:
    """The inverse of `unpack`. Raises ValueError when the codes along `axis` do not fill whole words."""
    assert bits in FIELD_BITS, bits
    assert codes.dtype == np.uint8, codes.dtype
    if words_for(codes.shape[axis], bits) is None:
        raise ValueError(f"{codes.shape[axis]} codes of {bits} bits do not fill whole 32-bit words")
    moved = np.moveaxis(codes, axis, -1)
    stream = np.unpackbits(moved[..., None], axis=-1, count=bits, bitorder="little").reshape(*moved.shape[:-1], -1)
    words = np.packbits(stream, axis=-1, bitorder="little").view("<i4").astype(np.int32, copy=False)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis))


def _split_nibbles(block: NDArray[np.uint8], pairs: NDArray[np.uint16]) -> None:
    """Each byte -> its low nibble, then its high one, in the two bytes of a u16: the common case, in four passes."""
    np.copyto(pairs, block)
    pairs |= pairs << np.uint16(4)
    pairs &= np.uint16(0x0F0F)


def _quads(block: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Bytes -> u32, each with the next four codes in its lowest 4 * bits bits."""
    if bits in (2, 4, 8):
        fields: NDArray[Any] = block.view(f"<u{bits // 2}")
        return np.asarray(fields, np.uint32)
    first, second, third = (block[..., i::3].astype(np.uint32) for i in range(3))
    quads = np.empty((*first.shape[:-1], 2 * first.shape[-1]), np.uint32)
    quads[..., 0::2] = first | (second & 15) << 8
    quads[..., 1::2] = second >> 4 | third << 4
    return quads


def _spread(quads: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """Four codes side by side -> one in each byte: move the upper two to the upper half, then split each half.

    Works in place. The copies never meet under the masks because a code has at most 4 bits, or 8 and stays where it is.
    """
    if bits == 8:
        return quads
    pairs = ((1 << 2 * bits) - 1) * 0x00010001
    single = ((1 << bits) - 1) * 0x01010101
    quads |= quads << np.uint32(16 - 2 * bits)
    quads &= np.uint32(pairs)
    quads |= quads << np.uint32(8 - bits)
    quads &= np.uint32(single)
    return quads
