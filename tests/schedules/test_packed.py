"""The packed layout: one word by hand, then there and back for any shape, then scales and zeros."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from schedules.geometry import Geometry
from schedules.packed import (
    ROW_PAD,
    blocks,
    code_packing,
    interleave,
    offset_packing,
    scale_packing,
    unpack_codes,
    zero_packing,
)
from schedules.storage import CHOICES, LANES, ONE_BYTE, QUAD, Storage, choose

groups = st.integers(1, 300)
STORAGES = [*dict.fromkeys(storage for choices in CHOICES.values() for storage in choices), ONE_BYTE]
NIBBLE = Storage(4)


def test_a_lane_of_4_bits_by_hand() -> None:
    """16 inputs, one span of two steps: low nibbles hold a step's inputs 0..3, high nibbles 4..7, side by side."""
    codes = np.zeros((2, 16), np.uint8)
    codes[1] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0]
    packed = code_packing(2, Geometry(16, 16), NIBBLE).pack(codes)
    assert packed.shape == (2, 1, 2, 1, 1, 16, 4)
    assert [f"{byte:02x}" for byte in packed[0, 0, 0, 0, 0, 1]] == ["51", "62", "73", "84"]
    assert [f"{byte:02x}" for byte in packed[0, 0, 1, 0, 0, 1]] == ["d9", "ea", "fb", "0c"]
    packed[0, 0, :, 0, 0, 1] = 0
    assert not packed.any()


def test_a_lane_of_8_bits_by_hand() -> None:
    codes = np.array([[10, 20, 30, 40, 50, 60, 70, 255]], np.uint8)
    packed = code_packing(1, Geometry(8, 8), ONE_BYTE).pack(codes)
    assert packed.shape == (2, 1, 2, 1, 1, 16, 4)
    assert packed[0, 0, :, 0, 0, 0].tolist() == [[10, 20, 30, 40], [50, 60, 70, 255]]
    assert packed.sum() == codes.sum()


def test_padding_inside_a_span_by_hand() -> None:  # 3 inputs, stored 8 wide: one step
    packed = code_packing(1, Geometry(3, 3), NIBBLE).pack(np.array([[1, 2, 3]], np.uint8))
    assert packed[0, 0, 0, 0, 0, 0].tolist() == [1, 2, 3, 0]
    packed = code_packing(1, Geometry(6, 6), NIBBLE).pack(np.array([[1, 2, 3, 4, 5, 6]], np.uint8))
    assert packed[0, 0, 0, 0, 0, 0].tolist() == [0x51, 0x62, 3, 4]


def test_scales_and_zeros_by_hand() -> None:  # 172 in one group: two spans share its scale; 3 rows take 2 blocks
    geometry = Geometry(172, 172)
    scale = scale_packing(3, geometry, "float16").pack(np.array([[0.5], [-2], [3]], np.float16))
    assert (scale.shape, str(scale.dtype)) == ((2, 2, 1, 16), "float16")
    assert scale[0, :, 0, :4].tolist() == [[0.5, -2, 3, 0], [0.5, -2, 3, 0]]
    assert not scale[1].any()
    zero = zero_packing(3, geometry).pack(np.array([[8], [15], [0]], np.int16))
    assert (str(zero.dtype), zero[0, 1, 0, :3].tolist()) == ("uint8", [8, 15, 0])


def test_rows_come_in_pairs_of_blocks() -> None:
    assert [blocks(n) for n in (1, 16, 17, 32, 33, 64, 65)] == [2, 2, 2, 2, 4, 4, 6]
    assert ROW_PAD == 2 * LANES


def test_blocks_beside_each_other_by_hand() -> None:  # 64 rows, two by two: blocks 0 and 1 share a stream
    codes = np.zeros((64, 16), np.uint8)
    codes[[0, 16, 32, 48], 8] = [1, 2, 3, 4]
    packed = code_packing(64, Geometry(16, 16), NIBBLE, 2).pack(codes)
    assert packed.shape == (2, 1, 2, 2, 1, 16, 4)
    assert packed[:, 0, 1, :, 0, 0, 0].tolist() == [[1, 2], [3, 4]]
    assert packed.sum() == codes.sum()
    scale = np.zeros((64, 2), np.float16)
    scale[[0, 16, 32, 48], 1] = [1, 2, 3, 4]
    assert scale_packing(64, Geometry(16, 8), "float16", 2).pack(scale)[:, 1, :, 0].tolist() == [[1, 2], [3, 4]]


def test_how_many_blocks_lie_beside_each_other() -> None:  # a power of two that divides them
    assert [interleave(n, 8) for n in (1, 64, 96, 128, 224, 5632)] == [2, 4, 2, 8, 2, 8]
    assert interleave(5632, 1) == 1


def test_the_narrowest_storage_that_fills_a_span() -> None:
    bits = (2, 3, 4, 5, 6, 8)
    assert [choose(b, 64).name for b in bits] == ["w2", "w2p1", "w4", "w4p1", "w4p2", "w8"]
    assert [choose(b, 8).name for b in bits] == ["w4", "w4", "w4", "w8", "w8", "w8"]  # 5 and 6 need 32 and 16


@given(storage=st.sampled_from(STORAGES), n=st.integers(1, 150), k=st.integers(1, 300), group=groups,
       most=st.sampled_from([1, 2, 8]), seed=st.integers(0, 99))  # fmt: skip
def test_codes_there_and_back(storage: Storage, n: int, k: int, group: int, most: int, seed: int) -> None:
    geometry = Geometry(k, min(group, k))
    assume(geometry.width % storage.inputs == 0)
    codes = np.random.default_rng(seed).integers(0, 1 << storage.bits, (n, k), dtype=np.uint8)
    packing = code_packing(n, geometry, storage, interleave(n, most))
    packed = packing.pack(codes)
    assert (packed.shape, str(packed.dtype)) == (packing.spec.shape, packing.spec.dtype)
    assert packed.flags.c_contiguous
    assert packed.nbytes == blocks(n) * LANES * geometry.spans * geometry.width * storage.bits // 8
    assert np.array_equal(unpack_codes(packed, n, geometry, storage), codes)
    ones = int(np.unpackbits(packed).sum(dtype=np.int64))
    assert ones == np.unpackbits(codes).sum(dtype=np.int64)  # so that all padding is 0


@given(n=st.integers(1, 150), k=st.integers(1, 300), group=groups, seed=st.integers(0, 99),
       most=st.sampled_from([1, 2, 8]), dtype=st.sampled_from(["float16", "float32"]))  # fmt: skip
def test_scales_and_zeros_of_every_span(n: int, k: int, group: int, seed: int, most: int, dtype: str) -> None:
    geometry = Geometry(k, min(group, k))
    rng, size = np.random.default_rng(seed), (n, -(-k // geometry.group))
    scale, zero = rng.standard_normal(size).astype(dtype), rng.integers(0, 256, size).astype(np.int16)
    for packing, array in (
        (scale_packing(n, geometry, dtype, interleave(n, most)), scale),
        (zero_packing(n, geometry, interleave(n, most)), zero.astype(np.uint8)),
    ):
        packed = packing.pack(array)
        assert (packed.shape, packed.dtype, str(packed.dtype)) == (packing.spec.shape, array.dtype, packing.spec.dtype)
        assert packed.flags.c_contiguous
        rows = packed.transpose(0, 2, 3, 1).reshape(-1, geometry.spans)
        assert np.array_equal(rows[:n], array[:, geometry.weight_group])
        assert not rows[n:].any()


@given(n=st.integers(1, 40), k=st.integers(1, 100), group=groups, seed=st.integers(0, 9))
def test_arrays_that_are_not_contiguous(n: int, k: int, group: int, seed: int) -> None:
    geometry = Geometry(k, min(group, k))
    codes = np.random.default_rng(seed).integers(0, 16, (k, n), dtype=np.uint8).T
    packing = code_packing(n, geometry, NIBBLE)
    assert np.array_equal(packing.pack(codes), packing.pack(np.ascontiguousarray(codes)))


@given(bits=st.sampled_from([2, 4, 8]), n=st.integers(1, 150), steps=st.integers(1, 40), turned=st.booleans(),
       x=st.sampled_from([1, 4, 8]), seed=st.integers(0, 9))  # fmt: skip
def test_words_give_the_same_bytes_as_codes(bits: int, n: int, steps: int, turned: bool, x: int, seed: int) -> None:
    storage = Storage(bits)
    k = storage.inputs * steps * (1 if storage.inputs % 8 == 0 else 2)
    packing = code_packing(n, Geometry(k, k // steps), storage, interleave(n, x))
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (n, k), dtype=np.uint8)
    fields = codes.reshape(n, -1, 32 // bits).astype(np.uint64) << np.arange(0, 32, bits, dtype=np.uint64)
    words = fields.sum(axis=2, dtype=np.uint64).astype(np.uint32)
    if turned:  # as GPTQ has them
        words = np.ascontiguousarray(words.T).T
    assert packing.pack_words is not None
    assert packing.word_bits == bits
    made = packing.pack_words(words)
    assert (made.shape, str(made.dtype)) == (packing.spec.shape, packing.spec.dtype)
    assert np.array_equal(made, packing.pack(codes))


def test_only_whole_words_are_packed_as_words() -> None:
    assert code_packing(8, Geometry(60, 30), NIBBLE).pack_words is None  # spans of 30 inputs are padded to 32
    assert code_packing(8, Geometry(64, 32), Storage(4, 2)).pack_words is None  # two planes


@given(n=st.integers(1, 400), times=st.integers(1, 3), x=st.sampled_from([1, 4, 8]), seed=st.integers(0, 9))
def test_slices_of_rows_are_packed_alone(n: int, times: int, x: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (n, 43), dtype=np.uint8)
    packing = code_packing(n, Geometry(43, 20), NIBBLE, interleave(n, x))
    at = times * packing.rows
    parts = [packing.pack(codes[start : start + at]) for start in range(0, n, at)]
    assert np.array_equal(np.concatenate(parts), packing.pack(codes))


def test_names_tell_layouts_apart() -> None:  # equal names mean equal layouts, and one weight has one
    names = {
        p.name
        for g in (Geometry(64, 32), Geometry(64, 64))
        for p in (
            *(code_packing(64, g, storage, x) for storage in STORAGES for x in (1, 2)),
            scale_packing(8, g, "float16"),
            scale_packing(8, g, "float32"),
            zero_packing(8, g),
            zero_packing(64, g, 2),
            offset_packing(8, g),
        )
    }
    assert len(names) == 2 * (2 * len(STORAGES) + 5)


@pytest.mark.parametrize("k", [8, 64, 704])
def test_dense_geometry_takes_the_short_way_to_the_same_bytes(k: int) -> None:
    geometry = Geometry(k, 8)
    codes = np.random.default_rng(0).integers(0, 16, (40, k), dtype=np.uint8)
    packed = code_packing(40, geometry, NIBBLE).pack(codes)
    for row, s in ((0, 0), (39, geometry.spans - 1)):
        lane = packed[row // LANES, s, 0, 0, 0, row % LANES]
        span = codes[row, 8 * s : 8 * s + 8]
        assert lane.tolist() == (span[:QUAD] | span[QUAD:] << 4).tolist()
