"""Codes as they lie in a checkpoint: unpacked some rows at a time and only when asked for, never whole by themselves.

A kernel's layout is another packing of the same bits, so whoever makes it wants either codes u8[rows, k] or, where both
are little-endian words along k, the words themselves.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compiler.quant.packing import unpack

U8 = NDArray[np.uint8]


class PackedRows(Protocol):
    """The codes of one module in a checkpoint's own packing; every code is below 2**bits."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""

    @property
    def bits(self) -> int:
        """Of a code."""

    def rows(self, start: int, stop: int) -> U8:
        """Codes u8[stop - start, k] of these rows."""

    def words(self, start: int, stop: int) -> NDArray[np.uint32] | None:
        """u32[stop - start, k * bits / 32], fields along k from the lowest bit up; None when it lies otherwise."""


@dataclass(frozen=True, eq=False)
class Fields:
    """Little-endian words along k, i32[n, >= k * bits / 32] of any strides; what is packed beyond k is padding.

    order: None, or the permutation of the inputs that brings act-order groups together.
    """

    stored: NDArray[np.int32]
    bits: int
    k: int
    order: NDArray[np.int32] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        return self.stored.shape[0], self.k

    def rows(self, start: int, stop: int) -> U8:
        """Codes u8[stop - start, k]."""
        part = self.stored[start:stop]
        if missing := -part.shape[1] % self.bits if self.bits == 3 else 0:  # 3-bit fields come by three words
            part = np.pad(part, ((0, 0), (0, missing)))
        codes = unpack(part, self.bits, axis=1)
        if self.order is not None:
            return np.take(codes, self.order, axis=1)  # 20 times faster than codes[:, order]
        return codes if codes.shape[1] == self.k else np.ascontiguousarray(codes[:, :self.k])

    def words(self, start: int, stop: int) -> NDArray[np.uint32] | None:
        """The words themselves, where nothing but the fields of all inputs is in them."""
        if self.order is not None or self.stored.shape[1] * 32 != self.k * self.bits:
            return None
        return self.stored[start:stop].view(np.uint32)


@dataclass(frozen=True, eq=False)
class Codes:
    """Codes [n, k] of one or more modules, one below the other; each an array u8[n_i, k] or still packed."""

    parts: tuple[U8 | PackedRows, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def array(self) -> U8:
        """All of them, u8[n, k]."""
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> U8:
        """Codes u8[stop - start, k] of these rows; a view where they are an array already."""
        found = [part[a:b] if isinstance(part, np.ndarray) else part.rows(a, b)
                 for part, a, b in self._touched(start, stop)]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def words(self, start: int, stop: int, bits: int) -> NDArray[np.uint32] | None:
        """u32[stop - start, k * bits / 32] with fields of `bits` bits, or None where these rows do not lie so."""
        found: list[Any] = []
        for part, a, b in self._touched(start, stop):
            if isinstance(part, np.ndarray) or part.bits != bits or (words := part.words(a, b)) is None:
                return None
            found.append(words)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _touched(self, start: int, stop: int) -> list[tuple[Any, int, int]]:
        """(part, first row, row behind the last) of every part that has some of these rows."""
        touched, top = [], 0
        for part in self.parts:
            n = part.shape[0]
            a, b = max(start - top, 0), min(stop - top, n)
            if a < b:
                touched.append((part, a, b))
            top += n
        return touched


def stack(codes: Sequence[Codes]) -> Codes:
    """The rows of all, in order, without touching them."""
    return Codes(tuple(part for item in codes for part in item.parts))
