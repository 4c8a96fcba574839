"""Linear layers for tests: random weights, kernels that take canonical arrays, one instruction set at a time."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import targets
from compiler.quant.grids import integer_grid
from compiler.quant.ir import QuantWeight
from schedules import isa as isas
from schedules.geometry import Geometry
from schedules.isa import Isa
from schedules.kernel import Lower, TensorSpec
from targets import features
from tests.emulator import x86
from tests.schedules.kernels import EPS32, NATIVE, Built, build, request

ISAS: list[Any] = [importlib.import_module(f"schedules.isa.{m.name}") for m in pkgutil.iter_modules(isas.__path__)]


@dataclass(frozen=True)
class Shape:
    """A linear layer: m tokens, n outputs, k inputs in groups."""

    bits: int
    m: int
    n: int
    k: int
    group: int
    scale: str
    residual: bool

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.k, self.group)

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)

    def __str__(self) -> str:
        tail = "-residual" if self.residual else ""
        return f"w{self.bits}-m{self.m}-n{self.n}-k{self.k}-g{self.group}-{self.scale}{tail}"


def shapes() -> list[Shape]:
    """A sample of all combinations: every group size with both bits, every other value of an axis in turn."""
    tokens, rows, scales = (1, 3, 16), (105, 1, 344, 16), ("float16", "float32")
    inputs = [(8, 8), (64, 8), (64, 32), (64, 64), (172, 43), (172, 128), (172, 172)]
    inputs += [(704, 32), (704, 43), (704, 64), (704, 128), (704, 704)]
    made = []
    for i, (k, group) in enumerate(inputs):
        for j, bits in enumerate((4, 8)):
            place = 2 * i + j
            m, n = tokens[place % 3], rows[(place + place // 4) % 4]
            made.append(Shape(bits, m, n, k, group, scales[(i + j) % 2], bool((i // 2 + j) % 2)))
    return made


def stand_in(isa: Isa) -> targets.Target:
    """A target with just the features the instruction set asks for, on the processor level they belong to."""
    arch = (
        NATIVE.arch
        if not isa.NEEDS
        else "aarch64"
        if set(isa.NEEDS) <= set(features.CPUINFO_NAMES["aarch64"])
        else "x86_64"
    )
    flags = tuple(f"+{name}" for name in isa.NEEDS)
    if arch == "aarch64":
        return replace(targets.load("aarch64"), features=flags)
    plain = set(features.X86_64_V3 | features.X86_64_V3_EXTRAS)
    level = "x86-64-v3" if set(isa.NEEDS) <= plain else "x86-64-v4"
    return replace(targets.load("x86-64"), name=isa.NAME, mcpu=level, features=flags)


def lacking(target: targets.Target) -> list[str]:
    """What neither this machine's CPU nor the emulator has of a stand-in, by /proc/cpuinfo's names."""
    if target.arch != NATIVE.arch:
        return [target.arch]
    needed = list(features.cpuinfo_names(target.arch, target.features, target.name))
    needed += features.X86_64_LEVELS[target.mcpu][1].values() if target.mcpu in features.X86_64_LEVELS else ()
    missing = [name for name in dict.fromkeys(needed) if name not in NATIVE.cpuinfo]
    return [name for name in missing if name not in x86.enable()] if missing else []


def require(target: targets.Target) -> None:
    """Skip where the code would not run."""
    if missing := lacking(target):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")


@dataclass(frozen=True)
class Layer:
    """A compiled linear layer that takes canonical arrays and packs them as its kernel asks."""

    built: Built

    def __call__(self, *args: np.ndarray) -> np.ndarray:
        packings = self.built.kernel.packings
        packed = [packings[i].pack(a) if i in packings else a for i, a in enumerate(args)]
        for i, packing in packings.items():
            assert (packed[i].shape, str(packed[i].dtype)) == (packing.spec.shape, packing.spec.dtype)
            assert packed[i].flags.c_contiguous
        (out,) = self.built(*packed)
        return out


def compiled(
    lower: Lower,
    op: str,
    args: Sequence[np.ndarray],
    n: int,
    target: targets.Target,
    knobs: dict[str, int] | None = None,
    **attrs: int,
) -> Layer:
    """The layer of n outputs for arguments like these (canonical weights)."""
    call = request(op, args, [TensorSpec((args[0].shape[0], n), "float32")], target, knobs, **attrs)
    kernel = lower(call)
    specs = [kernel.packings[i].spec if i in kernel.packings else s for i, s in enumerate(call.args)]
    return Layer(build(lambda _: kernel, replace(call, args=tuple(specs))))


def weight(shape: Shape, seed: int = 0) -> QuantWeight:
    """Random codes and zeros; scales of both signs, as round to nearest makes them, over three decades."""
    rng = np.random.default_rng(seed)
    grid = integer_grid(shape.bits)
    codes = rng.integers(0, grid.levels, (shape.n, shape.k), dtype=np.uint8)
    zero = rng.integers(0, grid.levels, (shape.n, shape.groups)).astype(np.int16)
    size = (shape.n, shape.groups)
    scale = (rng.choice([-1, 1], size) * 10 ** rng.uniform(-4, -1, size)).astype(shape.scale)
    return QuantWeight(codes, scale, zero, grid.name, shape.group)


def exact_weight(shape: Shape) -> QuantWeight:
    """The same with scales of plus or minus a half, one or two: products with integers are exact in float32."""
    random = weight(shape)
    rng = np.random.default_rng(1)
    scale = (rng.choice([-1, 1], random.scale.shape) * rng.choice([0.5, 1, 2], random.scale.shape)).astype(shape.scale)
    return replace(random, scale=scale)


def within(got: np.ndarray, want: np.ndarray, magnitude: np.ndarray, roundings: int) -> None:
    """|got - want| <= roundings * EPS32 * magnitude (the sum of the absolute terms), and want is rounded too.

    One more rounding than counted pays for the products of the EPS32, which are far below it.
    """
    bound = (roundings + 2) * EPS32 * magnitude
    worst = (np.abs(got.astype(np.float64) - want) / np.maximum(bound, 2.0**-140)).max()
    assert worst <= 1, f"{worst} times the bound"
