"""Act-order: inputs quantised in the order of their importance, so that a group is no longer a run of neighbours.

g_idx i32[k] names the group of every input. Stored columns are then gathered group by group, once, and activations
follow the same permutation: QuantWeight.permutation.
"""
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compiler.errors import FormatError


def permutation(g_idx: NDArray[np.int32] | None, k: int, group_size: int, where: str) -> NDArray[np.int32] | None:
    """None when inputs are in group order, else the stable order that brings each group together.

    Raises FormatError, which starts with `where`, for a g_idx that names no group or fills groups unevenly.
    """
    natural = np.arange(k) // group_size
    if g_idx is None or np.array_equal(g_idx, natural):
        return None
    groups = -(-k // group_size)
    outside = (g_idx < 0) | (g_idx >= groups)
    if outside.any():
        place = int(outside.argmax())
        raise FormatError(f"{where}: input {place} is in group {g_idx[place]}, but group_size {group_size} makes "
                          f"groups 0 to {groups - 1}. The file is damaged, or group_size is wrong.")
    uneven = np.bincount(g_idx, minlength=groups) != np.bincount(natural)
    if uneven.any():
        group = int(uneven.argmax())
        raise FormatError(f"{where}: group {group} has {int((g_idx == group).sum())} inputs, but group_size "
                          f"{group_size} needs {int((natural == group).sum())}. group_size is wrong, or the file is "
                          f"damaged.")
    return np.argsort(g_idx, kind="stable").astype(np.int32)
