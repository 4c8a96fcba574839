"""Columns of two arrays side by side: for layers that read one input but are quantised in different ways.

quern.concat  first f32[m, a], second f32[m, b] -> f32[m, a + b]
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import vector
from schedules.kernel import Kernel, Request
from schedules.vector import Expr


def lower(request: Request) -> Kernel:
    """One pass; tokens in parallel."""
    (m, a), (_, b) = (arg.shape for arg in request.args)
    name = f"concat_m{m}_a{a}_b{b}"
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        first = T.arg("first", T.buffer((m, a), "float32", layout=None))
        second = T.arg("second", T.buffer((m, b), "float32", layout=None))
        out = T.arg("out", T.buffer((m, a + b), "float32", layout=None))
        with T.sblock("concat"):
            T.reads(first[0:m, 0:a], second[0:m, 0:b])
            T.writes(out[0:m, 0 : a + b])
            with vector.tokens(m) as t:

                def copy(source: Any, start: int, columns: int) -> None:
                    def one(offset: Expr, lanes: int) -> None:
                        value = vector.load(source, t, offset, lanes=lanes)
                        vector.store(out, value, t, start + offset, lanes=lanes)

                    vector.sweep(columns, one)

                copy(first, 0, a)
                copy(second, a, b)
    return Kernel(name, builder.get())


LOWERS = {"quern.concat": lower}
