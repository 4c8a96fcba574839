"""What a schedule file offers: operator name -> scheduled kernel. Files are found by walking the folder.

A file whose kernels can be tuned also has `SPACES: dict[str, Callable[[Request], Space]]`, what may be chosen.

Every schedule file has `LOWERS: dict[str, Lower]`. A `Lower` gets a `Request` and gives a `Kernel`, or raises
`Unsupported` with the reason. Several files may offer one operator: they are asked in order of their `RANK` (0 if a
file states none), highest first, and one that is not meant for a request raises `NotSuited`.
Letters: n = output features, k = input features, m = tokens in the call.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from schedules.counted import counted

if TYPE_CHECKING:
    import numpy as np

    from targets import Target


class Unsupported(ValueError):
    """No schedule for this request on this target: the message says which operator, shape and target."""


class NotSuited(Exception):
    """This family is not meant for the request, say for its instruction set or token count: ask the next one."""


class OutsideSpace(ValueError):
    """Knobs that a schedule does not have, or values that it does not take: the message says which."""


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
    counted: between arguments and outputs there is one more parameter, span i32[2] (schedules.counted).
    """

    name: str
    func: Any
    packings: Mapping[int, Packing] = field(default_factory=dict)
    counted: bool = False


def _all_allowed(knobs: Mapping[str, int]) -> bool:
    return True


@dataclass(frozen=True)
class Space:
    """What may be chosen when a family lowers a request, every choice by name, so that records outlive the code.

    schedule: family and instruction set, "linear_int8.avx512_vnni": records of one never serve another.
    workload: what sets calls apart for tuning; calls that agree in it share their knobs.
    default: the stated default. choices: for every knob of the default the values worth trying, the default's included.
    macs: multiply-adds of a call, 0 where nobody counts them. allowed: False for points that are senseless or repeat
    another one.
    """

    schedule: str
    workload: Mapping[str, int | str]
    default: Mapping[str, int]
    choices: Mapping[str, tuple[int, ...]]
    macs: int = 0
    allowed: Callable[[Mapping[str, int]], bool] = _all_allowed

    @classmethod
    def around(cls, default: Mapping[str, int], tried: Mapping[str, tuple[int, ...]], **rest: Any) -> Space:
        """The space of `tried` values and the default's; a knob that `tried` leaves out stays at its default."""
        choices = {name: tuple(sorted({*tried.get(name, ()), value})) for name, value in default.items()}
        return cls(default=dict(default), choices=choices, **rest)

    def points(self) -> Iterator[dict[str, int]]:
        """Every allowed point but the default."""
        for values in itertools.product(*self.choices.values()):
            point = dict(zip(self.choices, values, strict=True))
            if point != self.default and self.allowed(point):
                yield point

    def check(self, knobs: Mapping[str, int]) -> None:
        """Raise OutsideSpace unless `knobs` names every knob, with values of this space that go together."""
        if odd := sorted(set(knobs) ^ set(self.choices)):
            what = f"has no knob {odd[0]!r}" if odd[0] in knobs else f"needs the knob {odd[0]!r}"
            raise OutsideSpace(f"{self.schedule} {what}; its knobs are {', '.join(self.choices)}")
        for name, value in knobs.items():
            if value not in self.choices[name]:
                values = ", ".join(map(str, self.choices[name]))
                raise OutsideSpace(f"{self.schedule}: {name} is {value}, but must be one of {values}")
        if not self.allowed(knobs):
            said = ", ".join(f"{name} {value}" for name, value in knobs.items())
            raise OutsideSpace(f"{self.schedule}: {said} do not go together")


Lower = Callable[[Request], Kernel]
Lowered = TypeVar("Lowered")  # a Kernel, or a schedules.cuda.kernel.CudaKernel


def spelled(number: float) -> str:
    """A float attribute as part of a kernel's name, with more digits than fp32 has."""
    return f"{number:.8e}".replace("-", "m").replace("+", "p").replace(".", "_")


def families(package: ModuleType) -> dict[str, list[ModuleType]]:
    """A package's schedule files by operator, the one that is asked first in front."""
    offers: dict[str, list[ModuleType]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for op in getattr(module, "LOWERS", {}):
            offers.setdefault(op, []).append(module)
    for op, found in offers.items():
        assert len({_rank(module) for module in found}) == len(found), f"{op} is lowered by two files of equal RANK"
        found.sort(key=_rank, reverse=True)
    return offers


def _rank(module: ModuleType) -> int:
    return int(getattr(module, "RANK", 0))


def lowerings() -> dict[str, Lower]:
    """All operators that have a schedule, collected from every module in this package. Kernels are counted."""
    import schedules

    found = families(schedules).items()
    return {op: _counting(first_suited([module.LOWERS[op] for module in modules])) for op, modules in found}


def space(request: Request) -> Space | None:
    """What may be chosen for this request by the family that will lower it; None if that has nothing to choose.

    Where the target computes on a GPU, that is a family of schedules/cuda/.
    """
    package = importlib.import_module("schedules" if request.target.gpu is None else "schedules.cuda")
    for module in families(package)[request.op]:
        try:
            if request.op in getattr(module, "SPACES", {}):
                found: Space = module.SPACES[request.op](request)
                return found
            module.LOWERS[request.op](request)
        except NotSuited:
            continue
        return None
    return None


def _counting(lower: Lower) -> Lower:
    return lambda request: counted(lower(request), len(request.args))


def first_suited(families: list[Callable[[Request], Lowered]]) -> Callable[[Request], Lowered]:
    """What lowers a request by the first family that is meant for it."""

    def lower(request: Request) -> Lowered:
        for family in families:
            try:
                return family(request)
            except NotSuited:  # noqa: PERF203 two or three families
                continue
        raise Unsupported(f"{request.op}: no kernel is meant for {request.args} on {request.target.name}")

    return lower
