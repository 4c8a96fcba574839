"""Spaces of the CUDA kernels: defaults lie in them, points are different kernels by name, and all of them are right."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

import numpy as np
import pytest

import schedules.cuda
from compiler.codegen import nvrtc
from compiler.tune import candidates
from schedules.cuda.kernel import CudaKernel, lowerings
from schedules.kernel import OutsideSpace, Request, Space, TensorSpec, Unsupported, families, space
from targets import Target
from tests.schedules.cuda import test_attention, test_linear_half
from tests.schedules.cuda.kernels import ALL, NANO, ORIN, SM90, XAVIER, check_resources
from tests.schedules.cuda.linears import arguments
from tests.schedules.cuda.linears import request as integer_request
from tests.schedules.test_linear_grids import spans, weight, weight_arguments

TOKENS = (1, 24)
LOWERS = lowerings()
# linear_w4a8_mma_sm87_m24_n192_k512_g64_s16_residual_t32r64w4s3o0: what is computed, for which chip, on what shape, and
# last every choice by a letter and a number.
GRAMMAR = re.compile(r"(?:linear|attention)_\w+?_(?:sm(\d+)_)?m(\d+)_\w+?_((?:[a-z]\d+)+)")


def attention(target: Target, cache: str, m: int, d: int = 128, group: int = 4) -> Request:
    return test_attention.request_of(target, cache, m, 2 * group, 2, d, 2048, {})


def half(target: Target, m: int, n: int = 192, k: int = 512) -> Request:
    w = test_linear_half.with_half_scale(weight("int4", False, n, k, 64))
    return test_linear_half.request_of(w, [np.zeros((m, k), np.float32), *weight_arguments(w)], target, False)


def integer(target: Target, m: int, n: int = 192, k: int = 512) -> Request:
    w = weight("int4", False, n, k, 64)
    return integer_request(arguments(spans(w, np.zeros((m, k))), w, None), w, target.name)


def plain(target: Target, m: int, n: int = 192, k: int = 512) -> Request:
    call = half(target, m, n, k)
    return replace(call, op="quern.linear_exact")


REQUESTS = [make(target, m) for m in TOKENS for target in ALL for make in (half, integer, plain)]
REQUESTS += [attention(target, cache, m) for m in TOKENS for target in ALL for cache in ("float16", "float32", "int8")]


def room(call: Request) -> Space:
    found = space(call)
    assert found is not None
    return found


def lowered(call: Request, knobs: dict[str, int]) -> CudaKernel:
    return LOWERS[call.op](replace(call, knobs=knobs))


def label(call: Request) -> str:
    return f"{call.op.removeprefix('quern.')}-{call.target.name}-m{call.args[0].shape[0]}-{call.args[1].dtype}"


@pytest.mark.parametrize("call", REQUESTS, ids=label)
def test_a_space_has_real_choices(call: Request) -> None:
    """Every point is another kernel, and says so in its name; weights lie as the default has them."""
    found = room(call)
    found.check(found.default)
    sources: dict[str, str] = {}
    default = lowered(call, dict(found.default))
    assert default.source == LOWERS[call.op](call).source
    for point in (found.default, *found.points()):
        found.check(point)
        kernel = lowered(call, dict(point))
        assert kernel.name not in sources, f"{point} and another point are both called {kernel.name}"
        sources[kernel.name] = kernel.source.replace(kernel.name, "NAME")
        assert {i: p.name for i, p in kernel.packings.items()} == {i: p.name for i, p in default.packings.items()}
        parts = GRAMMAR.fullmatch(kernel.name)
        assert parts is not None, kernel.name
        assert call.target.gpu is not None
        assert parts[1] in (None, call.target.gpu.arch[3:]) and int(parts[2]) == call.args[0].shape[0]
        assert len(re.findall(r"[a-z]", parts[3])) == len(set(re.findall(r"[a-z]", parts[3]))) >= len(found.default)
    assert len(sources) > 1 and len(set(sources.values())) == len(sources)


Small = tuple[tuple[tuple[int, ...], ...], dict[str, int | float | str]]  # shapes of the arguments, attributes
SMALL: dict[str, Small] = {
    "add": (((2, 4096), (2, 4096)), {}),
    "swiglu": (((2, 8192),), {}),
    "rms_norm": (((2, 4096), (4096,)), {"eps": 1e-5}),
    "embedding": (((2,), (100, 4096)), {"scale": 1.0}),
    "rms_norm_quantize": (((2, 4096), (4096,)), {"eps": 1e-5, "group": 128}),
    "rope_append": (
        ((2, 4096), (64, 64), (2,), (4, 4, 64, 16), (4, 64, 64)), {"heads": 56, "kv_heads": 4, "head_dim": 64},
    ),
}


@pytest.mark.parametrize("op", SMALL)
@pytest.mark.parametrize("target", ALL, ids=lambda t: t.name)
def test_small_kernels_have_blocks_of_several_sizes(op: str, target: Target) -> None:
    """That they are right at any point is test_plain's and test_quantize's affair."""
    shapes, attrs = SMALL[op]
    args = tuple(TensorSpec(shape, "float32") for shape in shapes)
    call = Request(f"quern.{op}", args, (TensorSpec((2, 4096), "float32"),), attrs, target)
    found = room(call)
    kernels = [lowered(call, dict(point)) for point in (found.default, *found.points())]
    assert kernels[0].name == LOWERS[call.op](call).name
    (knob, values), = found.choices.items()
    assert {kernel.name.rpartition("_")[2] for kernel in kernels} == {f"{knob[0]}{value}" for value in values}
    threads = {"threads": 1, "warps": 32}[knob]
    assert sorted(kernel.launches[0].block[0] // threads for kernel in kernels) == list(values)


def test_every_kernel_has_something_to_choose() -> None:
    found = {op for family in families(schedules.cuda).values() for m in family for op in getattr(m, "SPACES", {})}
    assert found == LOWERS.keys() - {"quern.last_span"}  # one thread writes two numbers


CHIPS = [(NANO, "int8", "int4"), (XAVIER, "float16", "int8"), (ORIN, "float16", "int4")]  # cache, grid
by_chip = pytest.mark.parametrize(("target", "cache", "grid"), CHIPS, ids=lambda v: getattr(v, "name", v))


@by_chip
def test_prompts_attention_at_any_point(target: Target, cache: str, grid: str) -> None:
    """Two points of each space in the emulator; one token's are in test_attention."""
    call = test_attention.request_of(target, cache, 20, 6, 2, 80, test_attention.CAPACITY, {})
    for point in sample(room(call)):
        made = test_attention.case(target, cache, 20, 6, 2, 80, point)
        for start, valid in ((15, 18), (test_attention.CAPACITY - 20, 20)):
            test_attention.check(made, *test_attention.random(made), start, valid)


@by_chip
def test_half_layers_at_any_point(target: Target, cache: str, grid: str) -> None:
    """Three points of each space, more than one tile of tokens and rows, the last ones not whole."""
    w = weight(grid, grid == "int8", 105, 256, 32)
    args = [np.zeros((70, 256), np.float32), *weight_arguments(w), np.zeros((70, 105), np.float32)]
    found = room(test_linear_half.request_of(w, args, target, True))
    x, residual = test_linear_half.real(70, 256, 105, True)
    for point in sample(found, 3):
        test_linear_half.check(test_linear_half.layer(w, 70, target, True, point), w, x, residual, True)


def sample(found: Space, count: int = 2) -> list[dict[str, int]]:
    """Points by lot, always the same."""
    return Random(found.schedule).sample(list(found.points()), count)


EDGES: list[tuple[Request, dict[str, int]]] = [  # the points that hold most in registers
    (attention(ORIN, "float16", 128), {"rows": 128, "block": 64}),
    (attention(SM90, "int8", 128, 80), {"rows": 16, "block": 128}),
    (attention(ORIN, "float16", 1, 256, 8), {"chunk": 512, "rows": 8, "threads": 256}),
    (attention(XAVIER, "float16", 128, 256), {"rows": 16, "block": 32}),
    (attention(NANO, "float16", 128, 64), {"rows": 64, "block": 32, "threads": 64}),
    (half(SM90, 128), {"tokens": 32, "rows": 64, "warps": 2, "stages": 4, "order": 1}),
    (half(XAVIER, 128), {"tokens": 64, "rows": 32, "order": 0}),
    (half(NANO, 128), {"tokens": 128, "rows": 64, "warps": 4, "order": 0}),
    (half(NANO, 128, 256), {"tokens": 16, "rows": 128, "warps": 1, "order": 0}),
    (integer(ORIN, 128), {"tokens": 32, "rows": 128, "warps": 2, "stages": 2, "order": 0}),
    (plain(NANO, 24), {"tokens": 16, "warps": 4}),
]


@pytest.mark.parametrize("place", range(len(EDGES)), ids=lambda i: label(EDGES[i][0]))
def test_no_edge_of_a_space_spills(place: int) -> None:
    """By both assemblers. What would spill, or not fit into shared memory or a block's registers, is no point."""
    call, point = EDGES[place]
    room(call).check(point)
    kernel, gpu = lowered(call, point), call.target.gpu
    assert gpu is not None
    code = nvrtc.compile(kernel.source, gpu)
    check_resources(code, 255)
    for launch in kernel.launches:
        held = -(-code.functions[launch.function].registers // 8) * 8 * launch.block[0]
        assert held <= (32 << 10 if gpu.sm == 53 else 64 << 10)  # CUDA C++ Programming Guide, compute capabilities


def test_tiles_that_do_not_fit_are_no_points() -> None:
    call, knobs = attention(ORIN, "float16", 128), {"rows": 64, "block": 128}
    with pytest.raises(OutsideSpace) as caught:
        room(call).check(knobs)
    assert str(caught.value) == "cuda.attention_mma.sm_87: rows 64, block 128 do not go together"
    with pytest.raises(Unsupported) as refused:
        lowered(call, knobs)
    assert str(refused.value) == "quern.attention: heads of 128 elements leave no room for rows 64, block 128"


def test_results_of_tensor_cores_may_differ_by_roundings() -> None:
    """Blocks of another size round weights against another maximum: tuning must not take that for a mistake."""
    assert candidates.tolerance(attention(ORIN, "float16", 24)) == candidates.HALF_TOLERANCE
    assert candidates.tolerance(attention(ORIN, "float32", 24)) == candidates.TOLERANCE
    assert candidates.tolerance(attention(ORIN, "float16", 1)) == candidates.TOLERANCE
    assert candidates.tolerance(half(NANO, 24)) == candidates.HALF_TOLERANCE
