"""The packed layout of integer kernels that take rows one at a time, four side by side: NEON without dot products.

W u8[n / 4, steps, vectors, 4 rows, 16]  a step is 16 bytes a row times the fields of a byte (schedules.storage,
                                         with 16 inputs where that has 4): 32 for 4 bits. Field f of byte b is input
                                         16 f + b of the step, so a row's low nibbles are its first 16 inputs.
                                         3, 5 and 6 bits share bytes as schedules.filled_bytes has it.
S f16|f32[n / 4, spans, 4]               scale of the row in that span (repeated when a weight group has parts)
Z u8|i8[n / 4, spans, 4]                 zero point, or F f32[n / 4, spans, 4], the offset; [1] of a symmetric weight
Steps run over all stored inputs (spans times width, schedules.geometry), whatever the spans: a step may hold several
short spans, or the end of one and the start of the next. The last step is filled up with code 0, and so are rows up to
a multiple of 4, with scale 0. 8-bit codes and their zeros are stored minus 128, as the signed bytes that SMULL takes.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from schedules import filled_bytes
from schedules.geometry import Geometry
from schedules.kernel import Packing, TensorSpec
from schedules.storage import ONE_BYTE, Storage

ROWS, BYTES = 4, 16  # rows side by side; bytes that a row has in a vector
MIDDLE = 128  # of 8-bit codes


def storage_of(bits: int) -> Storage:
    """Every width as it is: steps need not fill a span. Of those with `high`, only the counts are Storage's here."""
    return {2: Storage(2), 3: Storage(2, 1), 4: Storage(4), 5: Storage(4, 1), 6: Storage(4, 2), 8: ONE_BYTE}[bits]


def inputs_of(storage: Storage) -> int:
    """Inputs of a step."""
    return BYTES * storage.quads


def blocks(n: int) -> int:
    """Blocks of four rows that n rows take."""
    return -(-n // ROWS)


def steps(geometry: Geometry, storage: Storage) -> int:
    """Steps of a row."""
    return -(-geometry.spans * geometry.width // inputs_of(storage))


def weight_packings(
    first: int, n: int, geometry: Geometry, storage: Storage, scale: str, affine: str
) -> dict[int, Packing]:
    """Layouts of codes, scale, and zero or offset, which are the arguments from `first` on."""
    shape = (blocks(n), steps(geometry, storage), storage.vectors, ROWS, BYTES)
    codes = Packing(
        f"rows_{storage.name}_g{geometry.group}",
        TensorSpec(shape, "uint8"),
        partial(_pack_codes, geometry=geometry, storage=storage),
    )
    found = {first: codes, first + 1: _group_packing("s", n, geometry, scale)}
    if affine == "offset":
        found[first + 2] = _group_packing("f", n, geometry, "float32")
    elif affine in ("zero", "one_zero"):
        dtype, less = ("int8", MIDDLE) if storage == ONE_BYTE else ("uint8", 0)
        found[first + 2] = _group_packing("z", n, geometry, dtype, less)
        if affine == "one_zero":
            pack = partial(_pack_one, dtype=dtype, less=less)
            found[first + 2] = Packing(f"rows_z_one_{dtype}", TensorSpec((1,), dtype), pack)
    return found


def _pack_one(zero: np.ndarray, *, dtype: str, less: int) -> np.ndarray:
    return (zero.reshape(1) - less).astype(dtype)


def _group_packing(letter: str, n: int, geometry: Geometry, dtype: str, less: int = 0) -> Packing:
    spec = TensorSpec((blocks(n), geometry.spans, ROWS), dtype)
    pack = partial(_pack_groups, geometry=geometry, dtype=dtype, less=less)
    return Packing(f"rows_{letter}_{dtype}_g{geometry.group}", spec, pack)


def _pack_groups(array: np.ndarray, *, geometry: Geometry, dtype: str, less: int) -> np.ndarray:
    n = array.shape[0]
    spread = np.zeros((blocks(n) * ROWS, geometry.spans), dtype)
    spread[:n] = array[:, geometry.weight_group] - less if less else array[:, geometry.weight_group]
    return np.ascontiguousarray(spread.reshape(blocks(n), ROWS, geometry.spans).transpose(0, 2, 1))


def _pack_codes(codes: np.ndarray, *, geometry: Geometry, storage: Storage) -> np.ndarray:
    """u8[n, k] -> W, some rows at a time so that the buffers stay in the cache."""
    n, count, fields = codes.shape[0], steps(geometry, storage), storage.quads
    packed = np.empty((blocks(n), count, storage.vectors, ROWS, BYTES), np.uint8)
    at_once = max(1, (1 << 18) // (ROWS * count * inputs_of(storage)))
    for start in range(0, blocks(n), at_once):
        part = packed[start : start + at_once]
        placed = _placed(codes[start * ROWS : (start + at_once) * ROWS], len(part) * ROWS, geometry, storage)
        by_field = placed.reshape(len(part), ROWS, count, fields, BYTES).transpose(0, 2, 3, 1, 4)
        if storage.high:
            part[:] = filled_bytes.pack(by_field, storage.bits)
            continue
        for v in range(storage.vectors):
            group = by_field[:, :, v * storage.per_vector : (v + 1) * storage.per_vector]
            part[:, :, v] = _share_bytes(group, storage.low)
    return packed


def _placed(codes: np.ndarray, rows: int, geometry: Geometry, storage: Storage) -> np.ndarray:
    """u8[rows, steps * inputs]: inputs where spans want them; the rest 0 (8 bits: what is stored for 128)."""
    placed = np.zeros((rows, steps(geometry, storage) * inputs_of(storage)), np.uint8)
    if storage == ONE_BYTE:
        codes = codes ^ np.uint8(MIDDLE)
    if geometry.dense:
        placed[: codes.shape[0], : geometry.k] = codes
    else:
        source = geometry.source.reshape(-1)
        columns = np.flatnonzero(source >= 0)
        placed[: codes.shape[0], columns] = codes[:, source[columns]]
    return placed


def _share_bytes(fields: np.ndarray, bits: int) -> np.ndarray:
    """u8[blocks, steps, fields, rows, 16] -> the same without fields: the first in the lowest bits."""
    shared = fields[:, :, 0].copy()
    for f in range(1, fields.shape[2]):
        shared |= fields[:, :, f] << np.uint8(bits * f)
    return shared
