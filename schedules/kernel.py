"""What a schedule file offers: operator name -> scheduled kernel. Files are found by walking the folder.

Every schedule file has `LOWERS: dict[str, Lower]`. A `Lower` gets a `Request` and gives a `Kernel`, or raises
`Unsupported` with the reason. Several files may offer one operator: they are asked in order of their `RANK` (0 if a
file states none), highest first, and one that is not meant for a request raises `NotSuited`.
Letters: n = output features, k = input features, m = tokens in the call.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from targets import Target


class Unsupported(ValueError):
    """No schedule for this request on this target: the message says which operator, shape and target."""


class NotSuited(Exception):
    """This family is not meant for the request, say for its instruction set or token count: ask the next one."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and numpy-style dtype name of one tensor argument."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Request:
    """One operator call as the graph states it: tensors in, tensors out, attributes, and the target to run on.

    `args` and `outs` keep the operator's documented order. `knobs` overrides a schedule's default decisions by name.
    `table`: the real number each code stands for, when that is not the code itself.
    """

    op: str
    args: tuple[TensorSpec, ...]
    outs: tuple[TensorSpec, ...]
    attrs: Mapping[str, int | float | str]
    target: Target
    knobs: Mapping[str, int] = field(default_factory=dict)
    table: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Packing:
    """How one weight argument lies in memory for this kernel, and how to bring the canonical array there.

    `pack(array of canonical shape) -> C-contiguous array of spec.shape and spec.dtype`. Equal names: equal layouts.
    rows: 0, or any slice of rows that starts at a multiple of it may be packed alone; the results lie one behind the
    other. pack_words: None, or the same as `pack` from u32[rows, k * word_bits / 32], where codes of word_bits bits lie
    along k from the lowest bit up: many checkpoints have them so, and unpacking would be work for nothing.
    """

    name: str
    spec: TensorSpec
    pack: Callable[[np.ndarray], np.ndarray]
    rows: int = 0
    pack_words: Callable[[np.ndarray], np.ndarray] | None = None
    word_bits: int = 0


@dataclass(frozen=True)
class Kernel:
    """A scheduled PrimFunc: parameters are the operator's arguments in order, then its fresh outputs.

    `name` is a valid C identifier and states family, ISA and shape; equal names mean equal functions.
    `packings` maps an argument index to the layout the kernel wants there; other arguments come as the graph has them.
    """

    name: str
    func: Any
    packings: Mapping[int, Packing] = field(default_factory=dict)


Lower = Callable[[Request], Kernel]


def spelled(number: float) -> str:
    """A float attribute as part of a kernel's name, with more digits than fp32 has."""
    return f"{number:.8e}".replace("-", "m").replace("+", "p").replace(".", "_")


def lowerings() -> dict[str, Lower]:
    """All operators that have a schedule, collected from every module in this package."""
    import schedules

    offers: dict[str, list[tuple[int, str, Lower]]] = {}
    for info in pkgutil.iter_modules(schedules.__path__):
        module = importlib.import_module(f"schedules.{info.name}")
        for op, lower in getattr(module, "LOWERS", {}).items():
            offers.setdefault(op, []).append((-getattr(module, "RANK", 0), info.name, lower))
    for op, found in offers.items():
        assert len({rank for rank, _, _ in found}) == len(found), f"{op} is lowered by two files of equal RANK"
    return {op: _first_suited([lower for _, _, lower in sorted(found)]) for op, found in offers.items()}


def _first_suited(families: list[Lower]) -> Lower:
    first, *rest = families

    def lower(request: Request) -> Kernel:
        try:
            return first(request)
        except NotSuited:
            return _first_suited(rest)(request)

    return lower if rest else first
