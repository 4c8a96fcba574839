"""Quantisation joins the operator that made its input, so that the fp32 values never go to memory."""

from __future__ import annotations

import tvm
from tvm import relax

from compiler.graph import ops
from compiler.graph.ops import Op
from compiler.passes.rewrite import Context, rewrite

PRODUCERS = {"rms_norm": "rms_norm_quantize", "swiglu": "swiglu_quantize"}


@tvm.transform.module_pass(opt_level=0, name="FuseQuantize")
class FuseQuantize:
    """quantize(rms_norm(x, w)) -> rms_norm_quantize(x, w), and swiglu alike. A producer with a second user stays."""

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        """PassContext is not used."""
        return rewrite(mod, _rule)


def _rule(op: Op, context: Context) -> relax.Expr | None:
    if op.name != "quantize":
        return None
    made = context.producer(op.args[0])
    if made is None or made.name not in PRODUCERS:
        return None
    return ops.make(PRODUCERS[made.name], made.args, {**made.attrs, **op.attrs}, op.results)
