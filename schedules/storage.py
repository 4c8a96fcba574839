"""How codes share bytes: one bit plane, or two where a code's width is no power of two.

A step is what an instruction set unpacks at once: LANES rows times `inputs` consecutive inputs, as `vectors` vectors of
LANES rows times QUAD bytes. Quad f of a step is its inputs 4 f to 4 f + 3. The low plane has 8 / low quads in each of
its vectors, the first in the lowest bits; the high plane is one vector, the step's last, with all quads in it.
    code = low field | high field << low
bits 2: 4 quads a byte    3: planes of 2 and 1    4: 2 quads a byte    5: planes of 4 and 1    6: 4 and 2    8: 1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

LANES = 16  # output features a dot product works on at once
QUAD = 4  # consecutive inputs that lie side by side in one 32-bit lane

Table = tuple[int, ...]  # an int8 (or uint8) level for every code


@dataclass(frozen=True)
class Storage:
    """Bits of the two planes; high = 0 when there is one."""

    low: int
    high: int = 0

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.low + self.high

    @property
    def quads(self) -> int:
        """Groups of four inputs in a step."""
        return 8 // (self.high or self.low)

    @property
    def inputs(self) -> int:
        """Inputs in a step."""
        return QUAD * self.quads

    @property
    def vectors(self) -> int:
        """Vectors of 64 bytes in a step."""
        return self.quads * self.low // 8 + (1 if self.high else 0)

    @property
    def per_vector(self) -> int:
        """Quads in one vector of the low plane."""
        return 8 // self.low

    @property
    def name(self) -> str:
        """w4, or w4p2 with two planes."""
        return f"w{self.low}p{self.high}" if self.high else f"w{self.low}"


ONE_BYTE = Storage(8)
CHOICES = {
    2: (Storage(2), Storage(4)),
    3: (Storage(2, 1), Storage(4)),
    4: (Storage(4),),
    5: (Storage(4, 1), Storage(4, 2)),
    6: (Storage(4, 2),),
    8: (),
}


def choose(bits: int, width: int) -> Storage:
    """The narrowest storage for codes of `bits` whose steps fill a span of `width` stored inputs, a multiple of 8."""
    return next((storage for storage in CHOICES[bits] if width % storage.inputs == 0), ONE_BYTE)


def code(storage: Storage, f: Any, byte: Callable[[Any], Any]) -> Any:
    """The code of quad f as a uint8 expression; byte(v) is the byte of vector v at the code's row and place."""
    if storage.quads == 1:
        return byte(0)
    shift = T.Cast("uint8", T.floormod(f, storage.per_vector) * storage.low)
    value = T.shift_right(byte(T.floordiv(f, storage.per_vector)), shift)
    value = T.bitwise_and(value, T.uint8((1 << storage.low) - 1))
    if not storage.high:
        return value
    above = T.shift_right(byte(storage.vectors - 1), T.Cast("uint8", f * storage.high))
    above = T.bitwise_and(above, T.uint8((1 << storage.high) - 1))
    return T.bitwise_or(value, T.shift_left(above, T.uint8(storage.low)))


def level(table: Table | None, code: Any) -> Any:
    """int32 that a code multiplies with: itself, or its level, cut out of a word that holds eight levels."""
    if table is None:
        return T.Cast("int32", code)
    halves = [int.from_bytes(bytes(v & 255 for v in table[i : i + 8]), "little", signed=True) for i in (0, 8)]
    word = T.Select(code < T.uint8(8), T.int64(halves[0]), T.int64(halves[1]))
    place = T.Cast("int64", T.bitwise_and(code, T.uint8(7))) * T.int64(8)
    byte = T.bitwise_and(T.shift_right(word, place), T.int64(255))
    return T.Cast("int32", T.Cast("int8" if min(table) < 0 else "uint8", byte))


def unpack(storage: Storage, w: Sequence[Any], lanes: int, shifts_bytes: bool = False) -> list[Any]:
    """Codes of every quad as u8 vectors [QUAD * lanes], from the step's vectors. shifts_bytes: the CPU can do that."""
    if storage.quads == 1:
        return [w[0]]
    found = []
    for f in range(storage.quads):
        place = f % storage.per_vector * storage.low
        value = _field(w[f // storage.per_vector], place, 0, storage.low, lanes, shifts_bytes)
        if storage.high:
            value = T.bitwise_or(value, _field(w[-1], f * storage.high, storage.low, storage.high, lanes, shifts_bytes))
        found.append(value)
    return found


def _field(w: Any, place: int, to: int, bits: int, lanes: int, shifts_bytes: bool) -> Any:
    """Bits place..place+bits-1 of every byte, moved to `to`. Shifts whole 16-bit words where bytes cannot be (x86)."""
    width = QUAD * lanes
    if place != to and shifts_bytes:
        shift = T.shift_right if place > to else T.shift_left
        w = shift(w, T.broadcast(T.uint8(abs(place - to)), width))
        if place > to == 0 and place + bits == 8:
            return w
    elif place != to:
        words = T.reinterpret(f"uint16x{width // 2}", w)
        shift = T.shift_right if place > to else T.shift_left
        words = shift(words, T.broadcast(T.uint16(abs(place - to)), width // 2))
        w = T.reinterpret(f"uint8x{width}", words)
    return T.bitwise_and(w, T.broadcast(T.uint8(((1 << bits) - 1) << to), width))
