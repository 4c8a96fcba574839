"""Grids: the real numbers that codes stand for before scale, zero and offset. w = scale * (grid[code] - zero) + offset.

An integer grid "int<b>" has 2**b codes and grid[code] = code. A table grid lists the float32 value of every code.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

INTEGER_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Grid:
    """2**bits codes. values: None for an integer grid, else the value of every code, exact in float32."""

    name: str
    bits: int
    values: tuple[float, ...] | None = None

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero of a symmetric weight on an integer grid."""
        return 1 << (self.bits - 1)

    @cached_property
    def table(self) -> NDArray[np.float32]:
        """f32[levels]: what each code stands for."""
        return np.array(range(self.levels) if self.values is None else self.values, np.float32)

    @property
    def unit(self) -> np.float32:
        """Value of one int8 level of a table grid: the largest value becomes level 127."""
        return np.float32(np.abs(self.table).max() / np.float32(127))

    @cached_property
    def int8_levels(self) -> NDArray[np.int8]:
        """i8[levels]: a table grid for integer kernels, which take level * unit for the value, half to even."""
        assert self.values is not None, self.name
        scaled = self.table.astype(np.float64) * (127 / float(np.abs(self.table).max()))
        return np.rint(scaled).astype(np.int8)


# bitsandbytes stores this table as `quant_map`; arXiv:2305.14314, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# bitsandbytes' FP4: sign, two bits of exponent, one of mantissa, over 12; code 8 is a second zero.
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
# llama.cpp's IQ4_NL and IQ4_XS: integers, so that their int8 levels are exact.
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

GRIDS = {f"int{bits}": Grid(f"int{bits}", bits) for bits in INTEGER_BITS} | {
    "nf4": Grid("nf4", 4, NF4),
    "fp4": Grid("fp4", 4, (*_FP4, *(0.0 - v for v in _FP4))),
    "iq4_nl": Grid("iq4_nl", 4, tuple(float(v) for v in IQ4_NL)),
}


def integer_grid(bits: int) -> Grid:
    """The integer grid of that many bits."""
    return GRIDS[f"int{bits}"]
