"""The residual sum on its own, where no linear layer could take it in.

quern.add  residual f32[m, d], x f32[m, d] -> f32[m, d]
"""

from __future__ import annotations

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import vector
from schedules.kernel import Kernel, Request
from schedules.vector import Expr


def lower(request: Request) -> Kernel:
    """One pass; tokens in parallel."""
    m, d = request.args[0].shape
    name = f"add_m{m}_d{d}"
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"tirx.noalias": True, "global_symbol": name})
            residual = T.arg("residual", T.buffer((m, d), "float32", layout=None))
            x = T.arg("x", T.buffer((m, d), "float32", layout=None))
            out = T.arg("out", T.buffer((m, d), "float32", layout=None))
            with T.sblock("add"):
                T.reads(residual[0:m, 0:d], x[0:m, 0:d])
                T.writes(out[0:m, 0:d])
                with vector.tokens(m) as t:

                    def both(offset: Expr, lanes: int) -> None:
                        total = vector.load(residual, t, offset, lanes=lanes) + vector.load(x, t, offset, lanes=lanes)
                        vector.store(out, total, t, offset, lanes=lanes)

                    vector.sweep(d, both)
    return Kernel(name, builder.get())


LOWERS = {"quern.add": lower}
