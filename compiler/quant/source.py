"""The border between checkpoints and formats: what a format needs from a checkpoint, and what it gives to others.

Both sides are protocols, so that `quant` never imports `checkpoint` and a model never learns which format it reads.
"""
from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compiler.errors import CheckpointError, FormatError
from compiler.quant.ir import DENSE_STORAGE, DenseWeight, QuantWeight, WeightType, all_finite
from compiler.quant.reference import F32, widen


class TensorView(Protocol):
    """What is known of a tensor before its bytes are read."""

    @property
    def dtype(self) -> str:
        """"float16", "bfloat16", "int32" ..."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape."""

    @property
    def file(self) -> Path:
        """The file that holds it."""


class ConfigView(Protocol):
    """One JSON object with typed getters; see compiler/checkpoint/config.py."""

    @property
    def data(self) -> dict[str, Any]:
        """The plain values."""

    @property
    def quantization(self) -> ConfigView | None:
        """The merged quantisation configuration."""

    def names(self) -> list[str]:
        """Names that have a value."""

    def has(self, key: str) -> bool:
        """Whether there is a value."""

    def where(self, key: str) -> str:
        """"FILE: section.key", to start a message with."""

    def accept(self, *keys: str) -> None:
        """Mark keys as handled."""

    def integer(self, key: str, low: int, high: int, default: int = ...) -> int:
        """An integer within bounds."""

    def boolean(self, key: str, default: bool = ...) -> bool:
        """true or false."""

    def string(self, key: str, choices: Collection[str] = ..., default: str = ...) -> str:
        """A string, one of choices."""

    def strings(self, key: str, default: tuple[str, ...] = ...) -> tuple[str, ...]:
        """A list of strings."""

    def section(self, key: str) -> ConfigView:
        """A nested object."""

    def refuse_unhandled(self, known_harmless: Iterable[str] = ...) -> None:
        """Raise ConfigError for keys that nobody read."""


class CheckpointView(Protocol):
    """An opened checkpoint; see compiler/checkpoint/folder.py."""

    @property
    def path(self) -> Path:
        """Its folder."""

    @property
    def config(self) -> ConfigView:
        """config.json."""

    @property
    def tensors(self) -> Mapping[str, TensorView]:
        """All tensors by name."""

    def array(self, name: str) -> NDArray[Any]:
        """A read-only view of the file; bfloat16 as uint16 bits."""


class Source(Protocol):
    """Weights by module name ("model.layers.0.self_attn.q_proj"), decoded when asked for, one module at a time."""

    def modules(self) -> list[str]:
        """Every module with a weight matrix, embeddings and output head included."""

    def has(self, module: str) -> bool:
        """Whether there is such a weight matrix."""

    def describe(self, module: str) -> WeightType:
        """Its shape and kind, from headers and, where inputs are permuted, the (short) tensor that says how."""

    def load(self, module: str) -> QuantWeight | DenseWeight:
        """The weight itself. Reads this module's tensors and no others."""

    def bias(self, module: str) -> F32 | None:
        """f32[n] that the linear layer adds to its output, perhaps zeros; None where the checkpoint has none."""

    def vector(self, name: str) -> F32:
        """A one-dimensional tensor as float32, by module ("model.norm") or by tensor name ("model.norm.weight")."""


def read_vector(checkpoint: CheckpointView, name: str) -> F32:
    """A norm weight, widened to float32. Raises FormatError when it is not one-dimensional, dense and finite."""
    tensor = name if name in checkpoint.tensors else f"{name}.weight"
    if tensor not in checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.path} has no tensor {tensor!r}. "
                              f"Is this the model that config.json describes?")
    info = checkpoint.tensors[tensor]
    if len(info.shape) != 1 or info.dtype not in DENSE_STORAGE:
        raise FormatError(f"{info.file}: {tensor} is {spelled(info)}, but a vector needs one dimension and one of "
                          f"{', '.join(DENSE_STORAGE)}. Quantised norms are not a thing quern knows.")
    values = widen(checkpoint.array(tensor), info.dtype)
    if not np.isfinite(values).all():
        raise FormatError(f"{info.file}: {tensor} has values that are not finite. The file is damaged: fetch it again.")
    return values


def read_bias(checkpoint: CheckpointView, module: str, n: int) -> F32 | None:
    """NAME.bias as f32[n], or None where there is none. auto-gptq writes one of zeros on every linear layer.

    Raises FormatError unless it is a finite vector of n dense numbers.
    """
    name = f"{module}.bias"
    if name not in checkpoint.tensors:
        return None
    info = checkpoint.tensors[name]
    if info.shape != (n,):
        raise FormatError(f"{info.file}: {name} is {spelled(info)}, but the weight of {module} has {n} rows, and each "
                          f"needs one number. The file is damaged, or from another model: fetch it again.")
    return np.ascontiguousarray(read_vector(checkpoint, name))


def scale_type(checkpoint: CheckpointView, name: str) -> str:
    """The element type that `read_scales` gives: float16 stays, bfloat16 and float32 become float32."""
    return "float16" if checkpoint.tensors[name].dtype == "float16" else "float32"


def read_scales(checkpoint: CheckpointView, name: str) -> NDArray[Any]:
    """Scales as float16 or float32, exactly as stored. Raises FormatError unless all are finite."""
    info = checkpoint.tensors[name]
    scales = widen(checkpoint.array(name), info.dtype) if info.dtype == "bfloat16" else checkpoint.array(name)
    refuse_not_finite(scales, f"{info.file}: {name}")
    return scales


def refuse_not_finite(values: NDArray[Any], where: str) -> None:
    """Raise FormatError when a scale is NaN or infinite."""
    if not all_finite(values):
        bad = int(values.size - np.isfinite(values).sum())
        raise FormatError(f"{where}: {bad} of {values.size} are NaN or infinite. "
                          f"The file is damaged or the quantisation failed: fetch it again, or quantise again.")


def spelled(info: TensorView) -> str:
    """dtype[shape] for a message."""
    return f"{info.dtype}[{', '.join(map(str, info.shape))}]"
