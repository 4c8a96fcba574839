"""Rotary position embedding as a table: cosines, then sines, for every position. Method: arXiv:2104.09864.

Computed here, so that the device needs no trigonometry and no scaling rule. Every step that transformers rounds to
float32 is rounded here too, but taken in float64: numpy's own float32 functions err by a few units in the last place,
and differently from CPU to CPU, which at position 4096 turns a fast pair by 2e-4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Frequencies = NDArray[np.float32]  # [head_dim / 2], radians a position


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


def table(context: int, frequencies: Frequencies) -> Frequencies:
    """f32[context, head_dim]: row p holds cos(p f) for all f, then sin(p f)."""
    angles = (np.arange(context, dtype=np.float32)[:, None] * frequencies[None, :]).astype(np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1, dtype=np.float32)
