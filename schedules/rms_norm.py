"""RMS norm as Hugging Face's LlamaRMSNorm computes it, alone or with the quantisation that follows it.

  quern.rms_norm           x f32[m, d], weight f32[d]; eps -> f32[m, d]
  quern.rms_norm_quantize  the same arguments; eps, group -> as quern.quantize
  quern.rms_norm_quantize_permuted  the same, then permutation i32[d]: quantises the permuted row

    out = x * (1 / sqrt(mean(x^2) + eps)) * weight
fp32. The squares add up in UNROLL * 16 lanes, then as a tree: the error grows with d / 64, not with d. x^2 must not
overflow, and eps must be a normal fp32 number.
Both operators make the same fp32 values, so the fused one equals quern.quantize(quern.rms_norm(x)) bit for bit.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import quantize, vector
from schedules.kernel import Kernel, Request, spelled
from schedules.vector import LANES, Expr

UNROLL = 4  # independent sums: one addition would wait for the last for 4 cycles


def inverse_rms(x: Any, t: Expr, d: int, eps: float, start: Expr = 0) -> Expr:
    """1 / sqrt(mean of squares + eps) of row t's d values from column `start` on."""
    mean = _sum_of_squares(x, t, d, start) / T.float32(d)
    root = vector.intrinsic("llvm.sqrt", mean + T.float32(eps), lanes=1)
    return vector.hold(T.float32(1) / root, 1)


def _sum_of_squares(x: Any, t: Expr, d: int, start: Expr) -> Expr:
    """Sum over d values of row t."""
    block = UNROLL * LANES
    sums = vector.registers(UNROLL)
    for u in range(UNROLL):
        vector.store(sums, vector.splat(0.0, LANES), u, 0, lanes=LANES)

    def add(u: int, offset: Expr) -> None:
        v = vector.hold(vector.load(x, t, start + offset, lanes=LANES), LANES)
        vector.store(sums, vector.load(sums, u, 0, lanes=LANES) + v * v, u, 0, lanes=LANES)

    if d >= block:
        with T.serial(d // block) as i:
            for u in range(UNROLL):
                add(u, i * block + u * LANES)
    whole = d - d % block
    rest = list(vector.pieces(d - whole))
    full = [offset for offset, lanes in rest if lanes == LANES]
    for u, offset in enumerate(full):
        add(u, whole + offset)
    first, *others = (vector.load(sums, u, 0, lanes=LANES) for u in range(UNROLL))
    for other in others:
        first = first + other
    squares = vector.total(first, LANES)
    for offset, lanes in rest[len(full) :]:
        v = vector.hold(vector.load(x, t, start + whole + offset, lanes=lanes), lanes)
        squares = squares + vector.total(v * v, lanes)
    return squares


def lower(request: Request) -> Kernel:
    """Two passes over a token's row: sum of squares, then scaling (and quantising). Tokens in parallel."""
    (m, d), eps, group = request.args[0].shape, float(request.attrs["eps"]), request.attrs.get("group")
    name = f"{request.op.partition('.')[2]}_m{m}_d{d}_eps{spelled(eps)}" + (f"_g{group}" if group else "")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        x = T.arg("x", T.buffer((m, d), "float32", layout=None))
        weight = T.arg("weight", T.buffer((d,), "float32", layout=None))
        places = quantize.order(request, d)
        out = quantize.declare(m, d, int(group) if group else None)
        with T.sblock("rms_norm"):
            T.reads(x[0:m, 0:d], weight[0:d], *places.regions)
            T.writes(*out.regions)
            with vector.tokens(m) as t:
                factor = inverse_rms(x, t, d, eps)

                def value(k: Expr, lanes: int) -> Expr:
                    place = places.at(k, lanes)
                    return x[t, place] * vector.splat(factor, lanes) * weight[place]

                out.emit(t, value)
    return Kernel(name, builder.get())


LOWERS = {"quern.rms_norm": lower, "quern.rms_norm_quantize": lower, "quern.rms_norm_quantize_permuted": lower}
