"""The packed layout of the integer kernels on CUDA: one for the one-token kernel and for those of a prompt.

W u32[n/4, positions, 4 rows]  a unit is one word: 8 consecutive inputs of a row at 4 bits, 4 at 8 bits. Four rows side
                               by side make the 16 bytes that a thread loads at once. 4 bits: low nibbles of the bytes
                               are inputs 0 to 3, high ones 4 to 7. 8 bits: bytes are codes minus 128, signed.
S f16|f32[n/4, spans, 4]       scale of the row in that span (repeated when a weight group has parts)
Z u8[n/4, spans, 4]            zero point (8 bits: minus 128, signed), or F f32[n/4, spans, 4], the offset
Codes of 2 and 3 bits are stored in 4, those of 5 and 6 in 8. Rows are filled up to a multiple of 4 with scale 0.

A lane of a warp works on `run` consecutive units, all of one span, so that it scales once for all of them; a warp's
load instruction must read neighbouring 16-byte pieces all the same. So the units of a row block lie in tiles of 32
lanes:
    tile 0: [step 0: lanes 0..31] [step 1: lanes 0..31] .. [step run-1: ..], then tile 1; the last one has fewer lanes
and the unit of (tile, step, lane) is number (32 tile + lane) * run + step of the row. `Layout.place` says it for
kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from schedules.geometry import Geometry
from schedules.kernel import Packing, TensorSpec
from schedules.packed import by_group

ROWS = 4  # side by side
LANES = 32
MOST_RUN = 4  # four loads of 16 bytes are 64 bytes of a row block for each scale; more would idle lanes of short rows
MIDDLE = 128  # of 8-bit codes


@dataclass(frozen=True)
class Layout:
    """Where the units of a row block lie. bits: of the storage, 4 or 8."""

    geometry: Geometry
    bits: int

    @property
    def inputs(self) -> int:
        """Inputs in a unit."""
        return 32 // self.bits

    @property
    def units(self) -> int:
        """Units in a span."""
        return self.geometry.width // self.inputs

    @property
    def run(self) -> int:
        """Consecutive units of one lane: they divide the span."""
        return next(r for r in range(MOST_RUN, 0, -1) if self.units % r == 0)

    @property
    def positions(self) -> int:
        """Units in a row."""
        return self.geometry.spans * self.units

    @property
    def slots(self) -> int:
        """Runs in a row; a tile has 32 of them, the last one perhaps fewer."""
        return self.positions // self.run

    @property
    def tiles(self) -> int:
        """Tiles in a row."""
        return -(-self.slots // LANES)

    @cached_property
    def place(self) -> np.ndarray:
        """i64[positions]: where unit u of a row lies."""
        unit = np.arange(self.positions)
        slot, step = unit // self.run, unit % self.run
        tile, lane = slot // LANES, slot % LANES
        lanes = np.minimum(LANES, self.slots - LANES * tile)
        return tile * LANES * self.run + step * lanes + lane

    @property
    def name(self) -> str:
        """Equal names mean equal layouts of rows of this geometry."""
        return f"cuda_w{self.bits}_k{self.geometry.k}_g{self.geometry.group}"


def storage_bits(bits: int) -> int:
    """4 or 8: what codes of `bits` are stored in."""
    return 4 if bits <= 4 else 8


def blocks(n: int) -> int:
    """Blocks of four rows that n rows take."""
    return -(-n // ROWS)


def weight_packings(first: int, n: int, layout: Layout, scale: str, affine: str) -> dict[int, Packing]:
    """Layouts of codes, scale, and zero or offset ("table": neither), which are the arguments from `first` on."""
    codes = TensorSpec((blocks(n), layout.positions, ROWS, 4), "uint8")
    found = {first: Packing(layout.name, codes, partial(_pack_codes, layout=layout), ROWS)}
    found[first + 1] = _groups("s", n, layout, scale)
    if affine == "offset":
        found[first + 2] = _groups("f", n, layout, "float32")
    elif affine == "zero":
        signed = layout.bits == 8
        found[first + 2] = _groups("z", n, layout, "int8" if signed else "uint8", MIDDLE if signed else 0)
    return found


def _groups(letter: str, n: int, layout: Layout, dtype: str, less: int = 0) -> Packing:
    spec = TensorSpec((blocks(n), layout.geometry.spans, ROWS), dtype)
    pack = partial(_pack_groups, n=n, geometry=layout.geometry, dtype=dtype, less=less)
    return Packing(f"cuda_{letter}_{dtype}_g{layout.geometry.group}", spec, pack)


def _pack_groups(array: np.ndarray, *, n: int, geometry: Geometry, dtype: str, less: int) -> np.ndarray:
    array = by_group(array, n, geometry)
    spread = np.zeros((blocks(n) * ROWS, geometry.spans), dtype)
    spread[:n] = array[:, geometry.weight_group] - less if less else array[:, geometry.weight_group]
    return np.ascontiguousarray(spread.reshape(blocks(n), ROWS, geometry.spans).transpose(0, 2, 1))


def _pack_codes(codes: np.ndarray, *, layout: Layout) -> np.ndarray:
    """u8[n, k] -> W as bytes, some rows at a time so that the buffers stay in the cache."""
    n = codes.shape[0]
    packed = np.empty((blocks(n), layout.positions, ROWS), "<u4")
    at_once = max(1, (1 << 18) // (ROWS * layout.positions * layout.inputs))
    for start in range(0, blocks(n), at_once):
        part = packed[start : start + at_once]
        placed = _placed(codes[start * ROWS : (start + at_once) * ROWS], len(part) * ROWS, layout)
        if layout.bits == 4:
            units = placed.reshape(len(part), ROWS, layout.positions, 2, 4)
            placed = units[:, :, :, 0] | units[:, :, :, 1] << np.uint8(4)
        words = np.ascontiguousarray(placed).view("<u4").reshape(len(part), ROWS, layout.positions)
        part[:, layout.place] = words.transpose(0, 2, 1)
    return packed.view(np.uint8).reshape(*packed.shape, 4)


def _placed(codes: np.ndarray, rows: int, layout: Layout) -> np.ndarray:
    """u8[rows, spans * width]: inputs where spans want them. Padding meets activations of 0: it may hold anything."""
    geometry = layout.geometry
    placed = np.zeros((rows, geometry.spans * geometry.width), np.uint8)
    if layout.bits == 8:
        codes = codes ^ np.uint8(MIDDLE)
    source = geometry.source.reshape(-1)
    if geometry.dense:
        placed[: codes.shape[0]] = codes
    else:
        columns = np.flatnonzero(source >= 0)
        placed[: codes.shape[0], columns] = codes[:, source[columns]]
    return placed
