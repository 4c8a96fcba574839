"""The packed layout all integer kernels on x86 and the generic one share.

W u8[blocks, spans, width * bits / 32, 16, 4]   16 rows side by side, 4 consecutive inputs of a row in one 32-bit lane
                                                bits 4: low nibble = first half of the span, high nibble = second half
                                                2- and 3-bit codes are stored in 4 bits, 6-bit codes in 8
S f16|f32[blocks, spans, 16]                    scale of the row in that span (repeated when a weight group has parts)
Z u8[blocks, spans, 16] (4 bits), i16 (8)       zero point
Spans and their padding: schedules.geometry. Rows are padded to a multiple of ROW_PAD with scale 0.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from schedules.geometry import Geometry
from schedules.isa import LANES, QUAD, fields
from schedules.kernel import Packing, TensorSpec

ROW_PAD = 32  # two lane blocks, so that every kernel can keep at least two weight streams going


def stored_bits(bits: int) -> int:
    """Bits a code takes in W: kernels know fields of 4 and 8, and a narrower code fits into the next one."""
    return 4 if bits <= 4 else 8


def blocks(n: int) -> int:
    """Lane blocks that n rows take."""
    return -(-n // ROW_PAD) * (ROW_PAD // LANES)


def zero_dtype(bits: int) -> str:
    """Storage of zero points."""
    return "uint8" if bits <= 4 else "int16"


def code_packing(n: int, geometry: Geometry, bits: int) -> Packing:
    """codes u8[n, k] -> W."""
    steps = geometry.width // (QUAD * fields(bits))
    spec = TensorSpec((blocks(n), geometry.spans, steps, LANES, QUAD), "uint8")
    return Packing(f"w{bits}_g{geometry.group}", spec, partial(_pack_codes, geometry=geometry, bits=bits))


def scale_packing(n: int, geometry: Geometry, dtype: str) -> Packing:
    """scale [n, groups] -> S."""
    spec = TensorSpec((blocks(n), geometry.spans, LANES), dtype)
    return Packing(f"s_{dtype}_g{geometry.group}", spec, partial(_pack_groups, geometry=geometry, dtype=dtype))


def zero_packing(n: int, geometry: Geometry, bits: int) -> Packing:
    """zero i16[n, groups] -> Z."""
    dtype = zero_dtype(bits)
    spec = TensorSpec((blocks(n), geometry.spans, LANES), dtype)
    return Packing(f"z_{dtype}_g{geometry.group}", spec, partial(_pack_groups, geometry=geometry, dtype=dtype))


def _pad_rows(array: np.ndarray) -> np.ndarray:
    extra = blocks(array.shape[0]) * LANES - array.shape[0]
    return np.pad(array, ((0, extra), (0, 0))) if extra else array


def _pack_codes(codes: np.ndarray, *, geometry: Geometry, bits: int) -> np.ndarray:
    """The inverse is `unpack_codes`. Padding holds code 0; its activations are 0."""
    n = codes.shape[0]
    if geometry.dense:
        placed = _pad_rows(codes)
    else:
        source = geometry.source.reshape(-1)
        placed = _pad_rows(np.where(source >= 0, codes[:, source], 0).astype(np.uint8))
    count = fields(bits)
    steps = geometry.width // (QUAD * count)
    split = placed.reshape(blocks(n), LANES, geometry.spans, count, steps, QUAD)
    word = split[:, :, :, 0]
    for h in range(1, count):
        word = word | (split[:, :, :, h] << (bits * h))
    return np.ascontiguousarray(word.transpose(0, 2, 3, 1, 4))


def unpack_codes(packed: np.ndarray, n: int, geometry: Geometry, bits: int) -> np.ndarray:
    """W -> codes u8[n, k]: proves that packing loses nothing."""
    count = fields(bits)
    mask = (1 << bits) - 1
    parts = np.stack([(packed >> (bits * h)) & mask for h in range(count)], axis=2)  # blocks, spans, h, steps, 16, 4
    rows = parts.transpose(0, 4, 1, 2, 3, 5).reshape(blocks(n) * LANES, geometry.spans * geometry.width)
    source = geometry.source.reshape(-1)
    codes = np.zeros((n, geometry.k), np.uint8)
    codes[:, source[source >= 0]] = rows[:n, source >= 0]
    return codes


def _pack_groups(array: np.ndarray, *, geometry: Geometry, dtype: str) -> np.ndarray:
    n = array.shape[0]
    spread = _pad_rows(array[:, geometry.weight_group]).astype(dtype)
    return np.ascontiguousarray(spread.reshape(blocks(n), LANES, geometry.spans).transpose(0, 2, 1))
