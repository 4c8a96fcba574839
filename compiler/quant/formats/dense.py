"""Unquantised checkpoints: weight [n, k] in float16, bfloat16 or float32, as torch's Linear and Embedding keep it."""
from __future__ import annotations

from typing import Any

import numpy as np

from compiler.errors import CheckpointError, FormatError
from compiler.quant.ir import DENSE_STORAGE, DenseWeight, WeightType
from compiler.quant.reference import F32
from compiler.quant.source import CheckpointView, Source, read_bias, read_vector, spelled

NAME = "dense"


def claims(config: dict[str, Any]) -> bool:
    """Nothing says how the weights are quantised, so they are not."""
    return config.get("quantization_config") is None


def open(checkpoint: CheckpointView) -> Source:  # noqa: A001 - what every format calls it
    """Weights as they are."""
    return DenseSource(checkpoint)


class DenseSource:
    """Every `NAME.weight` with two dimensions is a module; values are views of the mapped file."""

    def __init__(self, checkpoint: CheckpointView) -> None:
        self._checkpoint = checkpoint

    def modules(self) -> list[str]:
        """Modules in the order of the file."""
        tensors = self._checkpoint.tensors
        return [name.removesuffix(".weight") for name, info in tensors.items()
                if name.endswith(".weight") and len(info.shape) == 2]

    def has(self, module: str) -> bool:
        """Whether there is such a weight matrix."""
        return f"{module}.weight" in self._checkpoint.tensors

    def describe(self, module: str) -> WeightType:
        """Shape and dtype. Raises FormatError unless it is a non-empty matrix of 16- or 32-bit floats."""
        name = f"{module}.weight"
        if name not in self._checkpoint.tensors:
            raise self._missing(module)
        info = self._checkpoint.tensors[name]
        if len(info.shape) != 2 or 0 in info.shape or info.dtype not in DENSE_STORAGE:
            raise FormatError(f"{info.file}: {name} is {spelled(info)}, but a dense weight needs two dimensions and "
                              f"one of {', '.join(DENSE_STORAGE)}. If it is quantised, config.json must say how.")
        n, k = info.shape
        return WeightType(n, k, info.dtype, 0)

    def load(self, module: str) -> DenseWeight:
        """A view of the file, not a copy; whoever computes with it meets what is not finite."""
        weight = self.describe(module)
        return DenseWeight(self._checkpoint.array(f"{module}.weight"), weight.grid)

    def bias(self, module: str) -> F32 | None:
        """What the linear layer adds, if anything."""
        return read_bias(self._checkpoint, module, self.describe(module).n)

    def vector(self, name: str) -> F32:
        """A norm weight as float32."""
        return np.ascontiguousarray(read_vector(self._checkpoint, name))

    def _missing(self, module: str) -> CheckpointError:
        found = ", ".join(repr(name) for name in self._checkpoint.tensors if name.startswith(f"{module}."))[:200]
        start = f"{self._checkpoint.path} has no tensor {f'{module}.weight'!r}"
        if found:
            return CheckpointError(f"{start}, but {found}. If another tool quantised it, config.json must name its "
                                   f"quant_method.")
        return CheckpointError(f"{start}. Is this the model that config.json describes?")
