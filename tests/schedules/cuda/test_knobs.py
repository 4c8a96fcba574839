"""Spaces of the CUDA kernels: defaults lie in them, points are different kernels by name, and all of them are right."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compiler.codegen import nvrtc
from compiler.tune import candidates
from schedules.cuda.kernel import CudaKernel, lowerings
from schedules.kernel import OutsideSpace, Request, Space, Unsupported, space
from targets import Target
from tests.schedules.cuda import test_attention, test_linear_half
from tests.schedules.cuda.kernels import ALL, NANO, ORIN, SM90, XAVIER, check_resources
from tests.schedules.cuda.linears import arguments
from tests.schedules.cuda.linears import request as integer_request
from tests.schedules.kernels import request as request_of
from tests.schedules.test_linear_grids import spans, weight, weight_arguments

TOKENS = (1, 24)
LOWERS = lowerings()
# linear_w4a8_mma_sm87_m24_n192_k512_g64_s16_residual_t32r64w4s3: what is computed, for which chip, on what shape, and
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
        assert parts[1] in (None, call.target.gpu.arch[3:]) and int(parts[2]) == call.args[0].shape[0]
        assert len(re.findall(r"[a-z]", parts[3])) == len(set(re.findall(r"[a-z]", parts[3]))) >= len(found.default)
    assert len(sources) > 1 and len(set(sources.values())) == len(sources)
