"""The residual sum joins the linear layer before it: its store adds instead of a pass over the hidden state."""

from __future__ import annotations

import tvm
from tvm import relax

from compiler.graph import ops
from compiler.graph.ops import SIGNATURES, Op
from compiler.passes.rewrite import Context, rewrite


@tvm.transform.module_pass(opt_level=0, name="FuseResidual")
class FuseResidual:
    """add(r, linear_*(x, w)) -> linear_*_residual(x, w, r). A linear with a second user stays."""

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        """PassContext is not used."""
        return rewrite(mod, _rule)


def _rule(op: Op, context: Context) -> relax.Expr | None:
    if op.name != "add":
        return None
    residual, x = op.args
    made = context.producer(x)
    if made is None or f"{made.name}_residual" not in SIGNATURES:
        return None
    return ops.make(f"{made.name}_residual", [*made.args, residual], made.attrs, op.results)
