"""Arguments of an operator for timing and checking: random, of the right shapes, in ranges that the operator takes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compiler.graph import ops
from schedules.kernel import Request, TensorSpec

# What a model reads once a token and has too much of for any cache: timed from memory, through many copies.
STREAMED = ("codes", "scale", "zero", "offset", "weight", "k_cache", "v_cache")
CONTEXT = 1024  # positions that attention sees, if the cache has as many
SEED = 0

Array = NDArray[Any]


def canonical(request: Request) -> dict[str, Array]:
    """Arguments by name, weights in canonical form."""
    names = ops.SIGNATURES[request.op.removeprefix(ops.PREFIX)].args
    random = np.random.default_rng(SEED)
    made = {name: _array(name, spec, request, random) for name, spec in zip(names, request.args, strict=True)}
    if "asum" in made:  # kernels may take it from there or add up themselves
        made["asum"] = made["q"].sum(-1, dtype=np.int32)
    return made


def _array(name: str, spec: TensorSpec, request: Request, random: np.random.Generator) -> Array:
    if name == "span":
        m = request.args[0].shape[0]
        return np.array([context(request) - m, m], spec.dtype)
    if name == "ids":
        return random.integers(0, request.args[1].shape[0], spec.shape, spec.dtype)
    if name == "codes":
        return random.integers(0, 1 << int(request.attrs["bits"]), spec.shape, spec.dtype)
    if name == "zero":
        return np.full(spec.shape, 1 << (int(request.attrs["bits"]) - 1), spec.dtype)
    if name in ("scale", "ascale"):
        return random.uniform(0.005, 0.015, spec.shape).astype(spec.dtype)
    if name == "permutation":
        return np.arange(spec.shape[0], dtype=spec.dtype)
    if np.issubdtype(np.dtype(spec.dtype), np.floating):
        return random.standard_normal(spec.shape, np.float32).astype(spec.dtype)
    return random.integers(-127, 128, spec.shape).astype(spec.dtype)


def context(request: Request) -> int:
    """Positions that a call of attention sees, at the end of which its own tokens stand."""
    names = ops.SIGNATURES[request.op.removeprefix(ops.PREFIX)].args
    capacity = request.args[names.index("v_cache")].shape[1]
    return min(capacity, max(CONTEXT, request.args[0].shape[0]))


def read_share(request: Request) -> float:
    """The part of the streamed arguments that one call reads: of a cache only the context, of weights all."""
    names = ops.SIGNATURES[request.op.removeprefix(ops.PREFIX)].args
    if "v_cache" not in names:
        return 1.0
    return context(request) / request.args[names.index("v_cache")].shape[1]
