"""The layout that fp16 linear layers share, one token and many, on all chips.

W u8[n64, stored * bits / 8]          rows of codes of 4 or 8 bits, the narrower that holds them
S f16|f32[n64/8, groups, 8]           scale of 8 rows for a group of inputs: one 128-bit load of fp16
Z u8[n64/8, groups, 8]                zero point, or F f32[n64/8, groups, 8], the offset
n64 = n rounded up to 64 with scale 0. A group's inputs are padded to `width`: 16, or a multiple of 32.

128 bits of a row are a chunk of 32 (16) consecutive stored inputs. Codes lie in it so that a thread that wants all of
it, and the lane t = lane % 4 of an mma fragment that wants inputs 2t, 2t+1, 2t+8, 2t+9 of every 16, both get pairs of
neighbouring inputs by masks alone. Word t of a chunk:
  4 bits: nibble j is the first, nibble j + 4 the second input of pair j = 0..3, whose first input is
          16 (j / 2) + 8 (j % 2) + 2 t: a mask of 0x000f000f puts both where halves have their lowest bits
  8 bits: bytes 0, 1, 2, 3 are inputs 2t, 2t+1, 2t+8, 2t+9
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from schedules.kernel import Packing, TensorSpec

ROW_PAD = 64  # a tile of rows
ROWS = 8  # whose scales lie side by side


def stored_bits(bits: int) -> int:
    """Bits that a code takes."""
    return 4 if bits <= 4 else 8


@dataclass(frozen=True)
class Places:
    """Where inputs lie: k of them in weight groups of `group`, codes of `bits` (4 or 8) as stored."""

    k: int
    group: int
    bits: int

    @property
    def chunk(self) -> int:
        """Inputs in 128 bits."""
        return 128 // self.bits

    @property
    def width(self) -> int:
        """Stored inputs a group."""
        return 16 if self.group <= 16 else -(-self.group // 32) * 32

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-self.k // self.group)

    @property
    def stored(self) -> int:
        """Inputs of a row as stored, whole chunks."""
        return -(-self.groups * self.width // self.chunk) * self.chunk

    @property
    def dense(self) -> bool:
        """Whether places are inputs."""
        return self.stored == self.k

    @property
    def span(self) -> int:
        """Inputs, at most 64, that surely share a group if counted from a multiple of their number."""
        return next(s for s in (64, 32, 16) if self.width % s == 0)

    @cached_property
    def source(self) -> np.ndarray:
        """i64[stored]: input of every place, -1 where there is none."""
        place = np.arange(self.stored)
        inside, group = place % self.width, place // self.width
        k = group * self.group + inside
        return np.where((inside < self.group) & (k < self.k), k, -1)

    @cached_property
    def order(self) -> np.ndarray:
        """i64[chunk]: input of a chunk that lies at each of its fields, from the lowest bits of its first word on."""
        word, field = np.divmod(np.arange(self.chunk), 32 // self.bits)
        if self.bits == 8:
            return field // 2 * 8 + 2 * word + field % 2
        pair = field % 4
        return pair // 2 * 16 + pair % 2 * 8 + 2 * word + field // 4


def padded_rows(n: int) -> int:
    """Rows as stored."""
    return -(-n // ROW_PAD) * ROW_PAD


def weight_packings(first: int, n: int, places: Places, scale: str, affine: str) -> dict[int, Packing]:
    """Layouts of codes, scale, and zero or offset, which are the arguments from `first` on."""
    rows = TensorSpec((padded_rows(n), places.stored * places.bits // 8), "uint8")
    name = f"half_w{places.bits}_g{places.group}"
    found = {
        first: Packing(name, rows, partial(_pack_codes, places=places), ROW_PAD),
        first + 1: _by_group("s", n, places, scale),
    }
    if affine != "table":
        found[first + 2] = _by_group(
            *(("f", n, places, "float32") if affine == "offset" else ("z", n, places, "uint8"))
        )
    return found


def _by_group(letter: str, n: int, places: Places, dtype: str) -> Packing:
    spec = TensorSpec((padded_rows(n) // ROWS, places.groups, ROWS), dtype)
    pack = partial(_pack_groups, shape=(n, places.groups), dtype=dtype)
    return Packing(f"half_{letter}_{dtype}_g{places.group}", spec, pack)


def _pack_codes(codes: np.ndarray, *, places: Places) -> np.ndarray:
    n = codes.shape[0]
    placed = np.zeros((padded_rows(n), places.stored), np.uint8)
    if places.dense:
        placed[:n] = codes
    else:
        placed[:n, places.source >= 0] = codes[:, places.source[places.source >= 0]]
    fields = placed.reshape(len(placed), -1, places.chunk)[:, :, places.order]
    if places.bits == 4:
        fields = fields[..., 0::2] | fields[..., 1::2] << np.uint8(4)
    return np.ascontiguousarray(fields).reshape(len(placed), -1)


def _pack_groups(array: np.ndarray, *, shape: tuple[int, int], dtype: str) -> np.ndarray:
    n, groups = shape
    assert dtype != "uint8" or (array.min() >= 0 and array.max() < 256), "a zero is below 256"
    padded = np.zeros((padded_rows(n), groups), dtype)
    padded[:n] = array  # a symmetric weight's one zero goes everywhere
    return np.ascontiguousarray(padded.reshape(-1, ROWS, groups).transpose(0, 2, 1))


def unpack_codes(packed: np.ndarray, n: int, places: Places) -> np.ndarray:
    """W -> codes u8[n, k]: proves that packing loses nothing."""
    fields = np.stack([packed & 15, packed >> 4], -1) if places.bits == 4 else packed
    fields = fields.reshape(len(packed), -1, places.chunk)
    placed = np.empty_like(fields)
    placed[:, :, places.order] = fields
    codes = np.zeros((n, places.k), np.uint8)
    rows = placed.reshape(len(packed), -1)[:n]
    codes[:, places.source[places.source >= 0]] = rows[:, places.source >= 0]
    return codes
