"""Bit fields: worked by hand for every width, then against a loop over single bits, then there and back."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.quant.packing import BLOCK_CODES, pack, unpack


def by_bits(words: np.ndarray, bits: int) -> list[list[int]]:
    """The definition: row by row one long integer, read `bits` bits at a time from its low end."""
    out = []
    for row in words.tolist():
        stream = sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(row))
        out.append([stream >> shift & (1 << bits) - 1 for shift in range(0, 32 * len(row), bits)])
    return out


def test_by_hand() -> None:
    def first(word: int, bits: int) -> list[int]:
        return unpack(np.array([[word]], np.uint32).view(np.int32), bits, 1)[0].tolist()
    assert first(0x76543210, 4) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert first(0xF0000008, 4) == [8, 0, 0, 0, 0, 0, 0, 15]
    assert first(0b11_10_01_00, 2) == [0, 1, 2, 3] + [0] * 12
    assert first(0xFF800100, 8) == [0, 1, 128, 255]


def test_three_bits_straddle_words_by_hand() -> None:  # value 10 = bits 30..32, value 21 = bits 63..65
    words = np.array([[1 << 30, 1 | 1 << 31, 0b10]], np.uint32).view(np.int32)
    codes = unpack(words, 3, 1)[0]
    assert codes[10] == 0b101
    assert codes[21] == 0b101
    assert codes.sum() == 10


@given(bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(1, 5), units=st.integers(1, 4), seed=st.integers(0, 99))
def test_agrees_with_single_bits_along_either_axis(bits: int, rows: int, units: int, seed: int) -> None:
    words = np.random.default_rng(seed).integers(-2**31, 2**31, (rows, 3 * units)).astype(np.int32)
    codes = unpack(words, bits, 1)
    assert codes.tolist() == by_bits(words, bits)
    assert np.array_equal(unpack(words.T, bits, 0), codes.T)
    assert np.array_equal(unpack(np.ascontiguousarray(words.T), bits, 0), codes.T)
    assert np.array_equal(pack(codes, bits, 1), words)
    assert np.array_equal(pack(np.ascontiguousarray(codes.T), bits, 0), words.T)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_blocks_join(bits: int) -> None:  # more codes than one block, and a last block that is not full
    rows = 2 * BLOCK_CODES // 4096 + 3
    words = np.random.default_rng(0).integers(-2**31, 2**31, (rows, 4096 * bits // 32)).astype(np.int32)
    codes = unpack(words, bits, 1)
    for row in (0, rows // 2, rows - 1):
        assert codes[row].tolist() == by_bits(words[row:row + 1], bits)[0]


def test_refuses_codes_that_do_not_fill_words() -> None:
    with pytest.raises(ValueError, match=r"^7 codes of 4 bits do not fill whole 32-bit words$"):
        pack(np.zeros((2, 7), np.uint8), 4, 1)
