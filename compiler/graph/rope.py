"""Rotary position embedding as a table: cosines, then sines, for every position. Method: arXiv:2104.09864.

Computed here, so that the device needs no trigonometry and no scaling rule. Every step that transformers rounds to
float32 is rounded here too, but taken in float64: numpy's own float32 functions err by a few units in the last place,
and differently from CPU to CPU, which at position 4096 turns a fast pair by 2e-4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def inverse_frequencies(head_dim: int, theta: float) -> NDArray[np.float32]:
    """f32[head_dim / 2]: theta ** (-2 i / head_dim)."""
    exponent = np.arange(0, head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(head_dim)
    power = np.power(np.float64(np.float32(theta)), exponent.astype(np.float64)).astype(np.float32)
    return (np.float32(1) / power).astype(np.float32)


def table(context: int, frequencies: NDArray[np.float32]) -> NDArray[np.float32]:
    """f32[context, head_dim]: row p holds cos(p f) for all f, then sin(p f)."""
    angles = (np.arange(context, dtype=np.float32)[:, None] * frequencies[None, :]).astype(np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1, dtype=np.float32)
