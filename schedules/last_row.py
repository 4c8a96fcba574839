"""What a prompt's last real row takes into the end of the last layer, where nobody asks for the other rows.

  quern.last_row   x f32[m, d], span i32[2] -> f32[1, d]   row span[1] - 1 of x
  quern.last_span  span i32[2] -> i32[2]                   that row's own span: (span[0] + span[1] - 1, 1)
span is (first position, number of real rows), 1 to m of them.
"""

from __future__ import annotations

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import vector
from schedules.kernel import Kernel, Request
from schedules.vector import Expr


def lower_row(request: Request) -> Kernel:
    """A copy by one thread: a row is a few KiB."""
    m, d = request.args[0].shape
    name = f"last_row_m{m}_d{d}"
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        x = T.arg("x", T.buffer((m, d), "float32", layout=None))
        span = T.arg("span", T.buffer((2,), "int32", layout=None))
        out = T.arg("out", T.buffer((1, d), "float32", layout=None))
        with T.sblock("last_row"):
            T.reads(x[0:m, 0:d], span[0:2])
            T.writes(out[0:1, 0:d])

            def copy(offset: Expr, lanes: int) -> None:
                vector.store(out, vector.load(x, span[1] - 1, offset, lanes=lanes), 0, offset, lanes=lanes)

            vector.sweep(d, copy)
    return Kernel(name, builder.get())


def lower_span(request: Request) -> Kernel:
    """Two numbers."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": "last_span"})
        span = T.arg("span", T.buffer((2,), "int32", layout=None))
        out = T.arg("out", T.buffer((2,), "int32", layout=None))
        with T.sblock("last_span"):
            T.reads(span[0:2])
            T.writes(out[0:2])
            T.buffer_store(out, span[0] + span[1] - 1, [0])
            T.buffer_store(out, T.int32(1), [1])
    return Kernel("last_span", builder.get())


LOWERS = {"quern.last_row": lower_row, "quern.last_span": lower_span}
