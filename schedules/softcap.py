"""Soft-capped logits: no value leaves -cap..cap, small ones stay as they are.

quern.softcap  x f32[m, n]; cap -> f32[m, n]     out = cap * tanh(x / cap)
fp32; relative error that of vector.tanh2 and two roundings.
"""

from __future__ import annotations

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import vector
from schedules.counted import marks
from schedules.kernel import Kernel, Request, spelled
from schedules.vector import Expr

PART = 4096  # columns a task takes: a vocabulary has up to 64 such parts, and one token must use all cores


def lower(request: Request) -> Kernel:
    """Parts of all rows in parallel."""
    (m, n), cap = request.args[0].shape, float(request.attrs["cap"])
    name = f"softcap_m{m}_n{n}_c{spelled(cap)}"
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        x = T.arg("x", T.buffer((m, n), "float32", layout=None))
        out = T.arg("out", T.buffer((m, n), "float32", layout=None))

        def part(t: Expr, start: Expr, length: int) -> None:
            def capped(offset: Expr, lanes: int) -> None:
                value = vector.load(x, t, start + offset, lanes=lanes) * vector.splat(2 * vector.LOG2_E / cap, lanes)
                result = vector.tanh2(value, lanes) * vector.splat(cap, lanes)
                vector.store(out, result, t, start + offset, lanes=lanes)

            vector.sweep(length, capped)

        with T.sblock("softcap"):
            T.reads(x[0:m, 0:n])
            T.writes(out[0:m, 0:n])
            parts = n // PART
            if parts:
                with T.parallel(m * parts, annotations=marks(times=parts) if m > 1 else None) as i:
                    part(i // parts, i % parts * PART, PART)
            if n % PART:
                with vector.tokens(m) as t:
                    part(t, parts * PART, n % PART)
    return Kernel(name, builder.get())


LOWERS = {"quern.softcap": lower}
