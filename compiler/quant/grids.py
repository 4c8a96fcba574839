"""Grids: the real numbers that codes stand for before scale and zero. w = scale * (grid[code] - zero).

An integer grid "int<b>" has 2**b codes and grid[code] = code. Table grids (nf4, fp4) will join here with their values.
"""
from __future__ import annotations

from dataclasses import dataclass

INTEGER_BITS = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Grid:
    """An integer grid: codes 0..2**bits-1, each standing for itself."""

    name: str
    bits: int

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero of a symmetric weight."""
        return 1 << (self.bits - 1)


GRIDS = {f"int{bits}": Grid(f"int{bits}", bits) for bits in INTEGER_BITS}


def integer_grid(bits: int) -> Grid:
    """The integer grid of that many bits."""
    return GRIDS[f"int{bits}"]
