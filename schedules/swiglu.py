"""SwiGLU's elementwise half, alone or with the quantisation that follows it; and the frame of its kin (geglu.py).

  quern.swiglu           gate_up f32[m, 2f] -> f32[m, f]      columns 0..f-1 are the gate, f..2f-1 are up
  quern.swiglu_quantize  gate_up f32[m, 2f]; group -> as quern.quantize with k = f
  quern.swiglu_quantize_permuted  gate_up, permutation i32[f]; group: quantises the permuted row

    out = gate / (1 + 2^(-gate * log2 e)) * up
fp32. Relative error of the sigmoid: 2^(...) carries |gate| * 2^-23 (rounding of the exponent) + vector.EXP2_ERROR.
Below gate = -88 the exponent is held at 127, which leaves an absolute error of at most |gate * up| * 2^-127.
Both operators make the same fp32 values, so the fused one equals quern.quantize(quern.swiglu(x)) bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import quantize, vector
from schedules.kernel import Kernel, Request
from schedules.vector import Expr


def silu(gate: Expr, lanes: int) -> Expr:
    """The exponent of a gate's sigmoid, 1 / (1 + 2^exponent)."""
    return gate * vector.splat(-vector.LOG2_E, lanes)


def gated(request: Request, kind: str, exponent: Callable[[Expr, int], Expr]) -> Kernel:
    """gate / (1 + 2^exponent(gate)) * up, in one pass over a token's row. Tokens in parallel."""
    (m, columns), group = request.args[0].shape, request.attrs.get("group")
    f = columns // 2
    name = f"{request.op.partition('.')[2]}_m{m}_f{f}" + (f"_g{group}" if group else "")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        gate_up = T.arg("gate_up", T.buffer((m, 2 * f), "float32", layout=None))
        places = quantize.order(request, f)
        out = quantize.declare(m, f, int(group) if group else None)
        with T.sblock(kind):
            T.reads(gate_up[0:m, 0 : 2 * f], *places.regions)
            T.writes(*out.regions)
            with vector.tokens(m) as t:

                def value(k: Expr, lanes: int) -> Expr:
                    place = places.at(k, lanes)
                    gate = vector.hold(gate_up[t, place], lanes)
                    power = vector.exp2(T.min(exponent(gate, lanes), vector.splat(127.0, lanes)), lanes)
                    divisor = vector.splat(1.0, lanes) + power
                    return vector.quotient(gate, divisor, lanes, request.target.arch) * gate_up[t, place + f]

                out.emit(t, value)
    return Kernel(name, builder.get())


def lower(request: Request) -> Kernel:
    """SwiGLU."""
    return gated(request, "swiglu", silu)


LOWERS = {"quern.swiglu": lower, "quern.swiglu_quantize": lower, "quern.swiglu_quantize_permuted": lower}
