"""The packed layout all integer kernels on x86 and the generic one share.

W u8[blocks/x, spans, steps, x, vectors, 16, 4] 16 rows side by side, 4 consecutive inputs of a row in one 32-bit lane;
                                                how many inputs a step has and how codes share bytes: schedules.storage
S f16|f32[blocks/x, spans, x, 16]               scale of the row in that span (repeated when a weight group has parts)
Z u8[blocks/x, spans, x, 16]                    zero point, or F f32[blocks/x, spans, x, 16], the offset; of a symmetric
                                                weight, whose zero is the same everywhere, Z u8[1]
x = interleave: that many blocks lie step by step beside each other, so that a kernel that works on x blocks at once
reads one stream. Spans and their padding: schedules.geometry. Rows are padded to a multiple of ROW_PAD with scale 0.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from schedules.geometry import Geometry
from schedules.kernel import Packing, Request, TensorSpec
from schedules.storage import LANES, QUAD, Storage

ROW_PAD = 32  # two lane blocks, so that every kernel can keep at least two weight streams going
BLOCK_CODES = 1 << 18  # codes packed at a time: the working buffers stay in the second-level cache
BLOCK_WORDS = 1 << 16  # the same for words, which need one buffer beside them
# Bits of a field -> (shift, mask) of the exchanges that turn the fields of a word, seen as [quads, QUAD]
TURNS = {2: ((12, 0x0000F0F0), (6, 0x00CC00CC)), 4: ((8, 0x0000FF00), (4, 0x00F000F0)), 8: ()}


def blocks(n: int) -> int:
    """Lane blocks that n rows take."""
    return -(-n // ROW_PAD) * (ROW_PAD // LANES)


def interleave(n: int, most: int) -> int:
    """How many of the lane blocks of n rows lie beside each other: a power of two up to `most`, itself one."""
    return math.gcd(blocks(n), most)


def code_packing(n: int, geometry: Geometry, storage: Storage, x: int = 1) -> Packing:
    """codes u8[n, k] -> W."""
    steps = geometry.width // storage.inputs
    spec = TensorSpec((blocks(n) // x, geometry.spans, steps, x, storage.vectors, LANES, QUAD), "uint8")
    pack = partial(_pack_codes, geometry=geometry, storage=storage, x=x)
    by_word = geometry.dense and storage.bits in TURNS and not storage.high
    pack_words = partial(_pack_words, geometry=geometry, storage=storage, x=x) if by_word else None
    name, rows = f"{storage.name}_g{geometry.group}_x{x}", max(ROW_PAD, x * LANES)
    return Packing(name, spec, pack, rows, pack_words, storage.bits if by_word else 0)


def scale_packing(n: int, geometry: Geometry, dtype: str, x: int = 1) -> Packing:
    """scale [n, groups] -> S."""
    return _group_packing("s", n, geometry, dtype, x)


def zero_packing(n: int, geometry: Geometry, x: int = 1) -> Packing:
    """zero i16[n, groups] -> Z; a zero is below 256."""
    return _group_packing("z", n, geometry, "uint8", x)


def one_zero_packing() -> Packing:
    """zero i16[1, 1] of a symmetric weight -> u8[1]."""
    return Packing("z_one", TensorSpec((1,), "uint8"), lambda zero: zero.reshape(1).astype(np.uint8))


def offset_packing(n: int, geometry: Geometry, x: int = 1) -> Packing:
    """offset f32[n, groups] -> F."""
    return _group_packing("f", n, geometry, "float32", x)


def affine_of(op: str) -> str:
    """What stands behind the scale in an operator's arguments: "zero", "offset", or "table" for neither."""
    return next((kind for kind in ("offset", "table") if f"_{kind}" in op), "zero")


def factors_of(request: Request, scale: int) -> str:
    """`affine_of`, or "one_zero" where the zero, argument `scale` + 1, is i16[1, 1]: one for the whole weight."""
    affine = affine_of(request.op)
    return "one_zero" if affine == "zero" and request.args[scale + 1].shape == (1, 1) else affine


def name_tail(factors: str, residual: bool) -> str:
    """What a kernel's name says of these."""
    return {"offset": "_offset", "one_zero": "_symmetric"}.get(factors, "") + ("_residual" if residual else "")


def weight_packings(
    first: int, n: int, geometry: Geometry, storage: Storage, scale: str, affine: str, x: int = 1
) -> dict[int, Packing]:
    """Layouts of codes, scale, and zero or offset, which are the arguments from `first` on. affine: as `factors_of`."""
    found = {first: code_packing(n, geometry, storage, x), first + 1: scale_packing(n, geometry, scale, x)}
    if affine == "one_zero":
        found[first + 2] = one_zero_packing()
    elif affine != "table":
        found[first + 2] = (offset_packing if affine == "offset" else zero_packing)(n, geometry, x)
    return found


def by_group(array: np.ndarray, n: int, geometry: Geometry) -> np.ndarray:
    """[n, groups], of that shape already or the [1, 1] of a symmetric weight."""
    return np.broadcast_to(array, (n, -(-geometry.k // geometry.group)))


def _group_packing(letter: str, n: int, geometry: Geometry, dtype: str, x: int) -> Packing:
    spec = TensorSpec((blocks(n) // x, geometry.spans, x, LANES), dtype)
    pack = partial(_pack_groups, n=n, geometry=geometry, dtype=dtype, x=x)
    return Packing(f"{letter}_{dtype}_g{geometry.group}_x{x}", spec, pack)


def _pack_codes(codes: np.ndarray, *, geometry: Geometry, storage: Storage, x: int) -> np.ndarray:
    """The inverse is `unpack_codes`. Padding holds code 0; its activations are 0. Some rows at a time: see BLOCK_CODES.

    Words of four codes move as one: the shifts and masks below keep every field inside its byte.
    """
    n, steps = codes.shape[0], geometry.width // storage.inputs
    packed = np.empty((blocks(n) // x, geometry.spans, steps, x, storage.vectors, LANES), "<u4")
    at_once = max(1, BLOCK_CODES // (x * LANES * geometry.spans * geometry.width))
    for start in range(0, len(packed), at_once):
        part = packed[start : start + at_once].transpose(0, 3, 1, 2, 4, 5)
        rows = len(part) * x * LANES
        placed = _placed(codes[start * x * LANES : start * x * LANES + rows], rows, geometry)
        quads = placed.view("<u4").reshape(-1, x, LANES, geometry.spans, steps, storage.quads)
        if storage.high:
            lows, high = storage.vectors - 1, quads >> np.uint32(storage.low) & _every_byte(storage.high)
            part[..., -1, :] = _share_bytes(high, storage.high).transpose(0, 1, 3, 4, 2)
            quads = quads & _every_byte(storage.low)
        else:
            lows = storage.vectors
        low = quads.reshape(*quads.shape[:-1], lows, storage.per_vector)
        part[..., :lows, :] = _share_bytes(low, storage.low).transpose(0, 1, 3, 4, 5, 2)
    return packed.view(np.uint8).reshape(*packed.shape, QUAD)


def _pack_words(words: np.ndarray, *, geometry: Geometry, storage: Storage, x: int) -> np.ndarray:
    """u32[n, words], fields along k from the lowest bit up -> W, as `_pack_codes` gives for dense spans.

    A lane's word of a step holds the fields of one such word, turned from [quads, QUAD] to [QUAD, quads].
    """
    n, count = words.shape
    packed = np.empty((blocks(n) // x, count, x * LANES), "<u4")
    at_once = max(1, BLOCK_WORDS // (x * LANES * count))
    for start in range(0, len(packed), at_once):
        part = packed[start : start + at_once]
        rows = words[start * x * LANES : (start + at_once) * x * LANES]
        turned = np.empty((count, len(part) * x * LANES), "<u4")
        turned[:, : len(rows)] = rows.T
        turned[:, len(rows) :] = 0
        _turn_fields(turned, storage.bits)
        line = np.dtype((np.void, 4 * x * LANES))  # one word of every lane: numpy moves it as a whole
        part.view(line)[:, :, 0] = turned.view(line).T
    steps = geometry.width // storage.inputs
    return packed.view(np.uint8).reshape(blocks(n) // x, geometry.spans, steps, x, storage.vectors, LANES, QUAD)


def _turn_fields(words: np.ndarray, bits: int) -> None:
    """In place: field 4 f + b of every word moves to place (8 / bits) b + f."""
    other = np.empty_like(words)
    for shift, mask in TURNS[bits]:  # exchange the fields under the mask with those `shift` bits above
        np.right_shift(words, np.uint32(shift), out=other)
        other ^= words
        other &= np.uint32(mask)
        words ^= other
        other <<= np.uint32(shift)
        words ^= other


def _placed(codes: np.ndarray, rows: int, geometry: Geometry) -> np.ndarray:
    """u8[n, k] -> contiguous u8[rows, spans * width]: inputs where spans want them, missing rows and padding 0."""
    if geometry.dense and codes.shape[0] == rows:
        return np.ascontiguousarray(codes)
    placed = np.zeros((rows, geometry.spans * geometry.width), np.uint8)
    source = geometry.source.reshape(-1)
    if geometry.dense:
        placed[: codes.shape[0]] = codes
    else:
        placed[: codes.shape[0], source >= 0] = codes[:, source[source >= 0]]
    return placed


def _every_byte(bits: int) -> np.uint32:
    """A mask of the lowest bits of all four bytes."""
    return np.uint32(((1 << bits) - 1) * 0x01010101)


def _share_bytes(words: np.ndarray, bits: int) -> np.ndarray:
    """u32[.., fields] -> u32[..]: the fields of a byte, first in the lowest bits."""
    shared = words[..., 0]
    for f in range(1, words.shape[-1]):
        shared = shared | words[..., f] << np.uint32(bits * f)
    return shared


def unpack_codes(packed: np.ndarray, n: int, geometry: Geometry, storage: Storage) -> np.ndarray:
    """W -> codes u8[n, k]: proves that packing loses nothing."""
    quads = []
    for f in range(storage.quads):
        low = packed[..., f // storage.per_vector, :, :] >> np.uint8(f % storage.per_vector * storage.low)
        code = low & np.uint8((1 << storage.low) - 1)
        if storage.high:
            high = (packed[..., -1, :, :] >> np.uint8(f * storage.high)) & np.uint8((1 << storage.high) - 1)
            code = code | (high << np.uint8(storage.low))
        quads.append(code)
    stacked = np.stack(quads, axis=4)  # blocks/x, spans, steps, x, quads, 16, 4
    rows = stacked.transpose(0, 3, 5, 1, 2, 4, 6).reshape(blocks(n) * LANES, geometry.spans * geometry.width)
    source = geometry.source.reshape(-1)
    codes = np.zeros((n, geometry.k), np.uint8)
    codes[:, source[source >= 0]] = rows[:n, source >= 0]
    return codes


def _pack_groups(array: np.ndarray, *, n: int, geometry: Geometry, dtype: str, x: int) -> np.ndarray:
    spread = np.zeros((blocks(n) * LANES, geometry.spans), dtype)
    spread[:n] = by_group(array, n, geometry)[:, geometry.weight_group]
    return np.ascontiguousarray(spread.reshape(blocks(n) // x, x, LANES, geometry.spans).transpose(0, 3, 1, 2))
