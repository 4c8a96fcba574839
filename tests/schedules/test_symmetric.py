"""A symmetric weight's one zero, i16[1, 1], gives to the bit what the same zero at every row and group gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import targets
from compiler.quant.grids import integer_grid
from compiler.quant.reference import quantize_activations
from schedules import (
    embedding_quantized,
    linear_float,
    linear_int8,
    linear_int8_amx,
    linear_int8_smmla,
    linear_int8_widening,
)
from schedules.cuda.kernel import lowerings as cuda_lowerings
from schedules.geometry import Geometry
from schedules.isa import neon_dotprod, neon_i8mm
from schedules.kernel import Kernel, Request, TensorSpec
from tests.schedules import emulated
from tests.schedules.kernels import ARM, NATIVE, build, spec
from tests.schedules.linears import ISAS, lacking, require, stand_in
from tests.schedules.test_linear_grids import weight
from tests.schedules.test_linear_int8_amx import AMX

HERE = [isa for isa in ISAS if not lacking(stand_in(isa))]
N, K, GROUP = 105, 172, 43
ONE = (1, 1)
ARM_ISAS: list[Any] = [neon_dotprod, neon_i8mm]
Arrays = list[np.ndarray]
Lower = Callable[[Request], Any]


def linear(path: str, m: int, bits: int, target: targets.Target) -> tuple[Request, Arrays]:
    """A call of a layer whose zeros are spelled out, with a residual."""
    rng = np.random.default_rng(0)
    w = weight(f"int{bits}", False, N, K, GROUP)
    x = rng.standard_normal((m, K)).astype(np.float32)
    inputs = [x] if path != "int8" else [*quantize_activations(x, Geometry(K, GROUP).source)]
    zeros = np.full(w.zero.shape, integer_grid(bits).middle, np.int16)
    args: Arrays = [*inputs, w.codes, w.scale, zeros, rng.standard_normal((m, N)).astype(np.float32)]
    outs = (TensorSpec((m, N), "float32"),)
    attrs = {"bits": bits, "group": GROUP}
    return Request(f"quern.linear_{path}_residual", tuple(map(spec, args)), outs, attrs, target), args


def shortened(request: Request, args: Arrays) -> tuple[Request, Arrays]:
    """The same call with one zero."""
    place = next(i for i, a in enumerate(args) if a.dtype == np.int16)
    fewer = [a[:1, :1] if i == place else a for i, a in enumerate(args)]
    return replace(request, args=tuple(map(spec, fewer))), fewer


def run(kernel: Kernel, request: Request, args: Arrays) -> np.ndarray:
    packed = [kernel.packings[i].pack(a) if i in kernel.packings else a for i, a in enumerate(args)]
    for i, packing in kernel.packings.items():
        assert spec(packed[i]) == packing.spec
    (out,) = build(lambda _: kernel, replace(request, args=tuple(map(spec, packed))))(*packed)
    return out


def equal(lower: Lower, request: Request, args: Arrays) -> None:
    one, fewer = shortened(request, args)
    want = run(lower(request), request, args)
    assert np.abs(want).max() > 1
    assert np.array_equal(run(lower(one), one, fewer), want)


@pytest.mark.parametrize(("m", "bits"), [(1, 4), (16, 8)])
@pytest.mark.parametrize("isa", HERE, ids=lambda isa: isa.NAME)
def test_integer_layers(isa: Any, m: int, bits: int) -> None:
    request, args = linear("int8", m, bits, stand_in(isa))
    equal(linear_int8.lower, request, args)
    one, _ = shortened(request, args)
    assert linear_int8.lower(one).name != linear_int8.lower(request).name
    assert linear_int8.lower(one).packings[5].spec == TensorSpec((1,), "uint8")  # nothing is streamed
    assert linear_int8.space(one).workload == linear_int8.space(request).workload  # what was tuned stays so


@pytest.mark.parametrize("bits", [4, 8])  # code - zero fits an int8, or the zero leaves in fp32
def test_integer_layers_on_tiles(bits: int) -> None:
    require(AMX)
    equal(linear_int8_amx.lower, *linear("int8", 17, bits, AMX))


def test_exact_layers() -> None:
    equal(linear_float.lower_exact, *linear("exact", 1, 4, NATIVE))


@pytest.mark.parametrize(
    ("lower", "target", "cpu", "m", "bits"),
    [
        (linear_int8_widening.lower, ARM, None, 1, 4),
        (linear_int8_widening.lower, ARM, None, 2, 8),
        (linear_int8.lower, stand_in(ARM_ISAS[0]), "cortex-a76", 1, 4),
        (linear_int8_smmla.lower, stand_in(ARM_ISAS[1]), "max", 4, 4),
    ],
    ids=["widening", "widening-8-bits", "dot-product", "matrix"],
)
def test_integer_layers_on_arm(lower: Lower, target: targets.Target, cpu: str | None, m: int, bits: int) -> None:
    here, args = linear("int8", m, bits, NATIVE)
    there, fewer = shortened(replace(here, target=target), args)
    kernel = lower(there)
    assert kernel.packings[5].spec.shape == (1,)
    (got,) = emulated.run(kernel, there, fewer, cpu)
    assert np.array_equal(got, run(linear_int8.lower(here), here, args))


def embedding(target: targets.Target) -> tuple[Request, Arrays]:
    w = weight("int4", False, 11, K, GROUP)
    args: Arrays = [np.array([3, 10], np.int32), w.codes, w.scale, np.full(w.zero.shape, 8, np.int16)]
    outs, attrs = (TensorSpec((2, K), "float32"),), {"bits": 4, "group": GROUP, "times": 40.0}
    return Request("quern.embedding_quantized", tuple(map(spec, args)), outs, attrs, target), args


def test_embeddings() -> None:
    equal(embedding_quantized.lower, *embedding(NATIVE))


@pytest.mark.parametrize("path", ["exact", "int8", "half", "embedding"])
@pytest.mark.parametrize("m", [1, 16])
def test_gpus_get_the_zero_at_every_row_and_group(path: str, m: int) -> None:
    """Their kernels stay as they are: the layout says the zero everywhere."""
    target = targets.load("jetson-orin")
    if path == "embedding":
        request, args = embedding(target)
    else:
        request, args = linear("exact" if path == "half" else path, m, 4, target)
        request = replace(request, op=f"quern.linear_{path}_residual")
    one, fewer = shortened(request, args)
    lower = cuda_lowerings()[request.op]
    spelled, short = lower(request), lower(one)
    assert (short.name, short.source) == (spelled.name, spelled.source)
    place = next(i for i, a in enumerate(args) if a.dtype == np.int16)
    assert fewer[place].shape == ONE
    got = short.packings[place].pack(fewer[place])
    assert spec(got) == spelled.packings[place].spec
    assert np.array_equal(got, spelled.packings[place].pack(args[place]))
