"""What a model needs from a checkpoint, by the names of the graph's parameters: no data, only where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compiler.quant.ir import WeightType


@dataclass(frozen=True)
class Linear:
    """y = x W^T. Rows of all `sources` (checkpoint modules that read the same x) one below the other.

    Graph parameters: NAME.codes, NAME.scale, NAME.zero for integer grids, NAME.weight for dense ones.
    """

    name: str
    sources: tuple[str, ...]
    type: WeightType


@dataclass(frozen=True)
class Table:
    """A dense matrix read row by row (embeddings). Graph parameter: NAME."""

    name: str
    source: str
    type: WeightType


@dataclass(frozen=True)
class Vector:
    """A float32 vector of n values (a norm's weight). Graph parameter: NAME."""

    name: str
    source: str
    n: int


@dataclass(frozen=True, eq=False)
class Constant:
    """Values the compiler computes (RoPE's table). Graph parameter: NAME."""

    name: str
    values: NDArray[np.float32]


Weight = Linear | Table | Vector | Constant
STORAGE = {"float16": "float16", "bfloat16": "uint16", "float32": "float32"}  # dense dtype -> how kernels see its bits
