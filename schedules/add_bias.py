"""The bias of a linear layer, as an operator of its own: m * n sums beside the layer's m * n * k.

quern.add_bias  x f32[m, n], bias f32[n] -> f32[m, n]
"""

from __future__ import annotations

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import vector
from schedules.kernel import Kernel, Request
from schedules.vector import Expr


def lower(request: Request) -> Kernel:
    """One pass; tokens in parallel."""
    m, n = request.args[0].shape
    name = f"add_bias_m{m}_n{n}"
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        x = T.arg("x", T.buffer((m, n), "float32", layout=None))
        bias = T.arg("bias", T.buffer((n,), "float32", layout=None))
        out = T.arg("out", T.buffer((m, n), "float32", layout=None))
        with T.sblock("add_bias"):
            T.reads(x[0:m, 0:n], bias[0:n])
            T.writes(out[0:m, 0:n])
            with vector.tokens(m) as t:

                def both(offset: Expr, lanes: int) -> None:
                    total = vector.load(x, t, offset, lanes=lanes) + vector.load(bias, offset, lanes=lanes)
                    vector.store(out, total, t, offset, lanes=lanes)

                vector.sweep(n, both)
    return Kernel(name, builder.get())


LOWERS = {"quern.add_bias": lower}
