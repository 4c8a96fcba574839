"""What a model needs from a checkpoint, by the names of the graph's parameters: no data, only where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compiler.quant.ir import WeightType


@dataclass(frozen=True)
class Linear:
    """y = x W^T. Rows of all `sources` (checkpoint modules that read the same x) one below the other.

    Graph parameters of a quantised one: NAME.codes, NAME.scale, then NAME.offset if it has offsets or NAME.zero if its
    grid is no table (i16[1, 1] if it is symmetric, where one says it all), and NAME.permutation if it is permuted;
    NAME.weight of a dense one; NAME.bias if there is a bias.
    `rows` counts the rows of each source. order: for each row of the graph's, which of the sources' rows it is; None:
    the same one.
    """

    name: str
    sources: tuple[str, ...]
    type: WeightType
    rows: tuple[int, ...]
    bias: bool = False
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Table:
    """A matrix read row by row (embeddings). Graph parameters: NAME if dense, else as a Linear's."""

    name: str
    source: str
    type: WeightType


@dataclass(frozen=True)
class Vector:
    """A float32 vector of n values (a norm's weight): (source + plus) * times. Graph parameter: NAME."""

    name: str
    source: str
    n: int
    plus: float = 0.0
    times: float = 1.0


@dataclass(frozen=True, eq=False)
class Constant:
    """Values the compiler computes (RoPE's table). Graph parameter: NAME."""

    name: str
    values: NDArray[np.float32]


Weight = Linear | Table | Vector | Constant
STORAGE = {"float16": "float16", "bfloat16": "uint16", "float32": "float32"}  # dense dtype -> how kernels see its bits
