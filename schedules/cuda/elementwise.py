"""Operators that make each element by itself: one thread an element. What they compute stands in schedules/OPERATOR.py.

  quern.add  quern.add_bias  quern.concat  quern.gather  quern.last_row  quern.softcap  quern.swiglu  quern.geglu
fp32. Sums, copies and gathers give the CPU's bits. exp2_approx and the divisions by 1 + 2^e cost up to 4 units in the
last place against the CPU's polynomial (2 of the exponential, each rounding once).
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt

from schedules.cuda.kernel import CudaKernel, Launch, block_size
from schedules.kernel import Request, Space, spelled

BLOCK = 256  # threads, the default
BLOCKS = (64, 128, 256, 512)
LOG2_E = 1.4426950408889634
CUBIC = 0.044715  # of GELU by tanh
Body = Callable[[Request], str]  # C++ that gives `value` from the row t and the column c of the result


def _add(request: Request) -> str:
    n = request.outs[0].shape[1]
    return f"const float value = load_constant(a + t * {n} + c) + load_constant(b + t * {n} + c);"


def _add_bias(request: Request) -> str:
    return f"const float value = load_constant(a + t * {request.outs[0].shape[1]} + c) + load_constant(b + c);"


def _concat(request: Request) -> str:
    first, second = (arg.shape[1] for arg in request.args)
    left, right = f"a + t * {first} + c", f"b + t * {second} + c - {first}"
    return f"const float value = c < {first} ? load_constant({left}) : load_constant({right});"


def _gather(request: Request) -> str:
    return f"const float value = load_constant(a + t * {request.outs[0].shape[1]} + b[c]);"


def _last_row(request: Request) -> str:
    return f"const float value = load_constant(a + (b[1] - 1) * {request.outs[0].shape[1]} + c);"


def _softcap(request: Request) -> str:
    cap, n = float(request.attrs["cap"]), request.outs[0].shape[1]
    # tanh(u) = 1 - 2 / (1 + 2^(2 u log2 e)); for small u by its series, where the difference would cancel.
    return f"""const float x = load_constant(a + t * {n} + c);
    const float u = x / {literal(cap)};
    const float wide = 1.0f - 2.0f / (1.0f + exp2_approx(fminf(u * {literal(2 * LOG2_E)}, 126.0f)));
    const float square = u * u;
    const float series = fmaf(fmaf(fmaf(square, {literal(-17 / 315)}, {literal(2 / 15)}), square, {literal(-1 / 3)}),
                              square * u, u);
    const float value = {literal(cap)} * (fabsf(u) < 0.25f ? series : wide);"""


def _gated(exponent: str) -> Body:
    def body(request: Request) -> str:
        f = request.outs[0].shape[1]
        return f"""const float gate = load_constant(a + t * {2 * f} + c);
    const float up = load_constant(a + t * {2 * f} + {f} + c);
    const float exponent = fminf({exponent}, 126.0f);
    const float value = gate / (1.0f + exp2_approx(exponent)) * up;"""

    return body


def literal(number: float) -> str:
    """A float constant in C++."""
    return f"{number:.9e}f"


_GELU = literal(-2 * sqrt(2 / pi) * LOG2_E), literal(-2 * sqrt(2 / pi) * LOG2_E * CUBIC)
BODIES: dict[str, Body] = {
    "add": _add,
    "add_bias": _add_bias,
    "concat": _concat,
    "gather": _gather,
    "last_row": _last_row,
    "softcap": _softcap,
    "swiglu": _gated(f"gate * {literal(-LOG2_E)}"),
    "geglu": _gated(f"gate * fmaf(gate * gate, {_GELU[1]}, {_GELU[0]})"),
}
INTEGERS = ("gather", "last_row")  # take an order or a span as their second argument


def lower(request: Request) -> CudaKernel:
    """A grid over the columns, a row of blocks for each token."""
    op, (m, n) = request.op.partition(".")[2], request.outs[0].shape
    block = request.knobs.get("threads", BLOCK)
    name = f"{op}_" + "_".join("x".join(map(str, arg.shape)) for arg in request.args)
    name += "".join(f"_{key}{spelled(float(value))}" for key, value in request.attrs.items())
    name += f"_t{block}"
    second = "" if len(request.args) == 1 else "const int32_t* b, " if op in INTEGERS else "const float* b, "
    source = f"""#include "quern.cuh"
extern "C" __global__ void {name}(const float* a, {second}float* out) {{
  const int c = blockIdx.x * {block} + threadIdx.x, t = blockIdx.y;
  if (c < {n}) {{
    {BODIES[op](request)}
    out[t * {n} + c] = value;
  }}
}}
"""
    grid = (-(-n // block), m, 1)
    return CudaKernel(name, source, (Launch(name, grid, (block, 1, 1), tuple(range(len(request.args) + 1))),))


LOWERS = {f"quern.{op}": lower for op in BODIES}


def space(request: Request) -> Space:
    """Threads of a block: a short row wants small ones, or some multiprocessors have none."""
    m, n = request.outs[0].shape
    return block_size(request, "threads", BLOCK, BLOCKS, m=m, n=n)


SPACES = dict.fromkeys(LOWERS, space)
