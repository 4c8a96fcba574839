"""Where input feature k lies once activations are quantised group by group.

Weights have one scale per (row, group of g inputs). Integer kernels want equal, short groups whose length is a multiple
of 8, so a weight group longer than MAX_SPAN is cut into equal parts that share its scale, each part is padded with zero
activations to a multiple of 8, and a short last group is padded the same way. Padding costs bytes, never exactness.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

MAX_SPAN = 128  # int8 activations share one scale over at most this many inputs


@dataclass(frozen=True)
class Geometry:
    """k inputs in weight groups of `group` (the last may be short); group >= 1."""

    k: int
    group: int

    @property
    def parts(self) -> int:
        """Spans per weight group."""
        return -(-self.group // MAX_SPAN)

    @property
    def span(self) -> int:
        """Inputs per span before padding."""
        return -(-self.group // self.parts)

    @property
    def width(self) -> int:
        """Stored inputs per span: span rounded up to a multiple of 8."""
        return -(-self.span // 8) * 8

    @property
    def spans(self) -> int:
        """Spans in all: every weight group has `parts` of them."""
        return -(-self.k // self.group) * self.parts

    @property
    def dense(self) -> bool:
        """True when stored order equals input order, with no padding anywhere."""
        return self.spans * self.width == self.k

    @cached_property
    def source(self) -> np.ndarray:
        """i64[spans, width]: input index of every stored place, -1 where it is padding."""
        s = np.arange(self.spans)[:, None]
        o = np.arange(self.width)[None, :]
        inside = (s % self.parts) * self.span + o
        k = (s // self.parts) * self.group + inside
        return np.where((o < self.span) & (inside < self.group) & (k < self.k), k, -1)

    @cached_property
    def weight_group(self) -> np.ndarray:
        """i64[spans]: weight group whose scale and zero a span uses."""
        return np.arange(self.spans) // self.parts
