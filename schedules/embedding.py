"""Rows of the embedding table, one a token, widened to fp32 and multiplied by a constant.

  quern.embedding  ids i32[m], table f16 | bf16 bits in u16 | f32 [vocab, d]; scale -> f32[m, d]
ids must lie in 0..vocab-1: the runtime checks them, the kernel does not.
"""

from __future__ import annotations

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import vector
from schedules.kernel import Kernel, Request, spelled
from schedules.vector import Expr


def lower(request: Request) -> Kernel:
    """One copy loop a token; tokens in parallel."""
    ids, table = request.args
    (m,), (vocab, d), scale = ids.shape, table.shape, float(request.attrs.get("scale", 1.0))
    name = f"embedding_{table.dtype}_m{m}_v{vocab}_d{d}" + (f"_x{spelled(scale)}" if scale != 1 else "")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        id_of = T.arg("ids", T.buffer((m,), "int32", layout=None))
        rows = T.arg("table", T.buffer((vocab, d), table.dtype, layout=None))
        out = T.arg("out", T.buffer((m, d), "float32", layout=None))
        with T.sblock("embedding"):
            T.reads(id_of[0:m], rows[0:vocab, 0:d])
            T.writes(out[0:m, 0:d])
            with vector.tokens(m) as t:
                row = T.bind(id_of[t])

                def copy(offset: Expr, lanes: int) -> None:
                    value = vector.load(rows, row, offset, lanes=lanes)
                    if scale != 1:
                        value = value * vector.splat(scale, lanes)
                    vector.store(out, value, t, offset, lanes=lanes)

                vector.sweep(d, copy)
    return Kernel(name, builder.get())


LOWERS = {"quern.embedding": lower}
