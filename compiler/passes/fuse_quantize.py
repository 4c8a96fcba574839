"""Quantisation joins the operator that made its input, so that the fp32 values never go to memory."""

from __future__ import annotations

import tvm
from tvm import relax

from compiler.graph import ops
from compiler.graph.ops import Op
from compiler.passes.rewrite import Context, rewrite

PRODUCERS = ("rms_norm", "swiglu", "geglu")


@tvm.transform.module_pass(opt_level=0, name="FuseQuantize")
class FuseQuantize:
    """quantize(P(x)) -> P_quantize(x) for the producers P, and the gather of act-order joins in, from inside out:

    quantize(gather(x, p)) -> quantize_permuted(x, p)    quantize(gather(P(x), p)) -> P_quantize_permuted(x, p)
    A producer with a second user stays.
    """

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        """PassContext is not used."""
        return rewrite(mod, _rule)


def _rule(op: Op, context: Context) -> relax.Expr | None:
    if op.name != "quantize":
        return None
    x, permutation = op.args[0], []
    gather = context.producer(x)
    if gather is not None and gather.name == "gather":
        x, permutation = gather.args[0], [gather.args[1]]
    made = context.producer(x)
    if made is not None and made.name in PRODUCERS:
        name, args, attrs = f"{made.name}_quantize", made.args, {**made.attrs, **op.attrs}
    elif permutation:
        name, args, attrs = "quantize", (x,), dict(op.attrs)
    else:
        return None
    return ops.make(name + "_permuted" * bool(permutation), [*args, *permutation], attrs, op.results)
