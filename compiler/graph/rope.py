"""Rotary position embedding as a table: cosines, then sines, for every position. Method: arXiv:2104.09864.

Computed here, so that the device needs no trigonometry and no scaling rule. Every step that transformers rounds to
float32 is rounded here too, but taken in float64: numpy's own float32 functions err by a few units in the last place,
and differently from CPU to CPU, which at position 4096 turns a fast pair by 2e-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Frequencies = NDArray[np.float32]  # [r / 2], radians a position, of the r elements of a head that rotate


@dataclass(frozen=True, eq=False)
class Rotation:
    """How heads rotate; `factor` multiplies the elements that do.

    Kernels turn element i with element i + head_dim / 2, whole heads. Where only the first r elements rotate, the
    projections' rows are moved (`head_order`) so that partners lie that far apart, and the rest gets frequency 0.
    """

    frequencies: Frequencies
    factor: float = 1.0

    def head_order(self, head_dim: int) -> list[int]:
        """For each element of a head as kernels see it, its place in the checkpoint."""
        half, rest = len(self.frequencies), head_dim // 2 - len(self.frequencies)
        low, high = list(range(half)), list(range(half, 2 * half))
        still = list(range(2 * half, head_dim))
        return low + still[:rest] + high + still[rest:]

    def table(self, context: int, head_dim: int) -> NDArray[np.float32]:
        """f32[context, head_dim]: row p holds cos(p f) for all f, then sin(p f)."""
        angles = (np.arange(context, dtype=np.float32)[:, None] * self.frequencies[None, :]).astype(np.float64)
        made = np.zeros((context, 2, head_dim // 2), np.float32)
        made[:, 0] = 1
        for part, function in enumerate((np.cos, np.sin)):
            made[:, part, : len(self.frequencies)] = function(angles).astype(np.float32) * np.float32(self.factor)
        return made.reshape(context, head_dim)


def inverse_frequencies(head_dim: int, theta: float) -> Frequencies:
    """f32[head_dim / 2]: theta ** (-2 i / head_dim)."""
    exponent = np.arange(0, head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(head_dim)
    power = np.power(np.float64(np.float32(theta)), exponent.astype(np.float64)).astype(np.float32)
    return (np.float32(1) / power).astype(np.float32)


def scaled_linearly(frequencies: Frequencies, factor: float) -> Frequencies:
    """Positions count 1 / factor each. Method: arXiv:2306.15595."""
    return frequencies / np.float32(factor)


@dataclass(frozen=True)
class Llama3:
    """Scaling of Llama 3.1: long waves as if positions counted 1 / factor, short ones as they are, between them both.

    A wave is long above `context / low` positions, short below `context / high`. Source: transformers'
    _compute_llama3_parameters, in its float32 steps.
    """

    factor: float
    low: float
    high: float
    context: int  # positions the model was first trained with

    def apply(self, frequencies: Frequencies) -> Frequencies:
        """The scaled frequencies."""
        f32 = np.float32
        wave = f32(2 * np.pi) / frequencies
        slow = np.where(wave > f32(self.context / self.low), frequencies / f32(self.factor), frequencies)
        share = (f32(self.context) / wave - f32(self.low)) / f32(self.high - self.low)
        between = (f32(1) - share) * slow / f32(self.factor) + share * slow
        inside = (wave >= f32(self.context / self.high)) & (wave <= f32(self.context / self.low))
        return np.where(inside, between, slow).astype(f32)


@dataclass(frozen=True)
class Yarn:
    """YaRN, arXiv:2309.00071: pairs that turn often in the first context stay, those that turn seldom are scaled.

    Between `fast` and `slow` turns in `context` positions the pairs go over from one to the other. Source:
    transformers' _compute_yarn_parameters, in its float32 steps.
    """

    factor: float
    fast: float
    slow: float
    context: int
    whole: bool  # the first and last pair in between are rounded outwards

    def apply(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """The scaled frequencies."""
        f32, width = np.float32, 2 * len(frequencies)
        first, last = (
            width * np.log(self.context / (turns * 2 * np.pi)) / (2 * np.log(theta)) for turns in (self.fast, self.slow)
        )
        if self.whole:
            first, last = np.floor(first), np.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        if first == last:
            last += 0.001
        pairs = np.arange(len(frequencies), dtype=f32)
        stays = f32(1) - np.clip((pairs - f32(first)) / f32(last - first), f32(0), f32(1))
        powers = f32(1) / frequencies
        return (f32(1) / (f32(self.factor) * powers) * (f32(1) - stays) + frequencies * stays).astype(f32)

    @property
    def attention(self) -> float:
        """What the paper multiplies q and k by."""
        return float(0.1 * np.log(self.factor) + 1) if self.factor > 1 else 1.0


def stretched(frequencies: Frequencies, factors: Sequence[float]) -> Frequencies:
    """LongRoPE, arXiv:2402.13753: every frequency has a divisor of its own. f32[r / 2]."""
    powers = np.float32(1) / frequencies
    return (np.float32(1) / (np.array(factors, np.float32) * powers)).astype(np.float32)
