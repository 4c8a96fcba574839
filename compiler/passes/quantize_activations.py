"""Integer activations where weights are integers: the decision behind `--activations int8`."""

from __future__ import annotations

import tvm
from tvm import relax

from compiler.graph import ops
from compiler.graph.ops import Op
from compiler.passes.rewrite import Context, rewrite
from schedules.geometry import Geometry


def quantized_types(m: int, k: int, group: int) -> list[relax.TensorType]:
    """What `quantize` makes: q i8[m, spans, 2, width / 2] (a span in halves), scale f32 and sum i32 [m, spans]."""
    g = Geometry(k, group)
    return [
        ops.tensor((m, g.spans, 2, g.width // 2), "int8"),
        ops.tensor((m, g.spans), "float32"),
        ops.tensor((m, g.spans), "int32"),
    ]


@tvm.transform.module_pass(opt_level=0, name="QuantizeActivations")
class QuantizeActivations:
    """linear_exact(x, w) -> linear_int8(quantize(x), w). Needs stage `graph`. Dense linears stay."""

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        """PassContext is not used."""
        return rewrite(mod, _rule)


def _rule(op: Op, context: Context) -> relax.Expr | None:
    if op.name != "linear_exact":
        return None
    x, *weight = op.args
    m, k = ops.shape_of(x.ty)
    group = int(op.attrs["group"])
    triple = context.emit(ops.make("quantize", [x], {"group": group}, quantized_types(m, k, group)))
    parts = [context.emit(relax.TupleGetItem(triple, i)) for i in range(3)]
    return ops.make("linear_int8", [*parts, *weight], op.attrs, op.results)
