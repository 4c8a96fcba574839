"""Activations in fp16 where weights are quantised: the decision behind `--activations float16`, for GPUs."""

from __future__ import annotations

import tvm
from tvm import relax

from compiler.graph import ops
from compiler.graph.ops import Op
from compiler.passes.rewrite import Context, rewrite


@tvm.transform.module_pass(opt_level=0, name="HalfActivations")
class HalfActivations:
    """linear_exact(x, w) -> linear_half(x, w), for every kind of weight. Needs stage `graph`. Dense linears stay.

    x stays fp32 in the graph: the kernel rounds it, and adds up in fp32.
    """

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        """PassContext is not used."""
        return rewrite(mod, _rule)


def _rule(op: Op, context: Context) -> relax.Expr | None:
    if not op.name.startswith("linear_exact"):
        return None
    return ops.make(op.name.replace("exact", "half"), op.args, op.attrs, op.results)
