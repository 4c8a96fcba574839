"""weights.bin: every weight in its kernel's layout, aligned, in the graph's order, written one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import Weight, Weights

ALIGNMENT = 64  # bytes: a cache line, and one AVX-512 load
NAMES = {"uint16": "bfloat16"}  # numpy has no bfloat16


def write(path: Path, arrays: Iterable[tuple[str, NDArray[np.generic]]]) -> Weights:
    """Write `arrays` to `path`; the result says where each lies. uint16 arrays hold the bits of bfloat16."""
    tensors: list[Weight] = []
    with path.open("wb") as file:
        for name, array in arrays:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            tensors.append(
                Weight(
                    name, NAMES.get(str(array.dtype), str(array.dtype)), tuple(array.shape), file.tell(), array.nbytes
                )
            )
            file.write(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
    return Weights(path.name, ALIGNMENT, tuple(tensors))
