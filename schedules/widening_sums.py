"""Sums of products of bytes in 16 bits, by NEON's SMULL and SMLAL, moved to 32 bits before they overflow.

SADDLP and ADDP bring the sums of a span and four rows together, a lane for each row.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from schedules import vector
from schedules.packed_rows import ROWS
from schedules.vector import Expr

HALF = 8  # int16 sums in a register, products of one instruction
QMAX = 127  # of activations


def most_products(largest: int) -> int:
    """Products with codes of at most that size that one int16 sum holds."""
    return 32767 // (QMAX * largest)


@dataclass
class Sum:
    """A row's sum over one span and token so far: a chain of int16 products, and int32 of those that were moved."""

    most: int
    short: Expr = None
    products: int = 0
    long: Expr = None

    def add(self, code: Expr, activation: Expr) -> None:
        """One more product in each lane."""
        if self.products == self.most:
            self.move()
        product = T.Cast("int16x8", code) * T.Cast("int16x8", activation)
        self.short = vector.hold(product if self.short is None else self.short + product, HALF, "int16")
        self.products += 1

    def move(self) -> None:
        """int16 to int32, pair by pair."""
        pairs = T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp", self.short)
        self.long = vector.hold(pairs if self.long is None else self.long + pairs, 4, "int32")
        self.short, self.products = None, 0


def _add_pairs(a: Expr, b: Expr, dtype: str) -> Expr:
    """Sums of neighbours, those of a first."""
    lanes = HALF if dtype == "int16" else ROWS
    return vector.hold(T.call_llvm_pure_intrin(f"{dtype}x{lanes}", "llvm.aarch64.neon.addp", a, b), lanes, dtype)


def rows_together(sums: list[Sum]) -> Expr:
    """int32 vector [4]: the whole sum of each of four rows. Neighbours are added as int16 as long as they fit."""
    together: list[Expr] = [sum_.short for sum_ in sums]
    products = sums[0].products
    if sums[0].long is None:
        while len(together) > 1 and 2 * products <= sums[0].most:
            products *= 2
            together = [_add_pairs(a, b, "int16") for a, b in zip(together[::2], together[1::2], strict=True)]
        wide = [T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp", x) for x in together]
    else:
        for sum_ in sums:
            sum_.move()
        wide = [sum_.long for sum_ in sums]
    while len(wide) > 1:
        wide = [_add_pairs(a, b, "int32") for a, b in zip(wide[::2], wide[1::2], strict=True)]
    return vector.hold(wide[0], ROWS, "int32")
