"""Rotary position embedding as a table: cosines, then sines, for every position. Method: arXiv:2104.09864.

Computed here, in the float32 steps transformers takes, so that the device needs no trigonometry and no scaling rule.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def inverse_frequencies(head_dim: int, theta: float) -> NDArray[np.float32]:
    """f32[head_dim / 2]: theta ** (-2 i / head_dim)."""
    exponent = np.arange(0, head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(head_dim)
    return (np.float32(1) / np.power(np.float32(theta), exponent, dtype=np.float32)).astype(np.float32)


def table(context: int, frequencies: NDArray[np.float32]) -> NDArray[np.float32]:
    """f32[context, head_dim]: row p holds cos(p f) for all f, then sin(p f)."""
    angles = np.arange(context, dtype=np.float32)[:, None] * frequencies[None, :]
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1, dtype=np.float32)
