"""Integer activations where weights are integers: the decision behind `--activations int8`."""

from __future__ import annotations

import tvm
from tvm import relax

from compiler.graph import ops
from compiler.graph.ops import Op
from compiler.passes.rewrite import Context, rewrite
from schedules.geometry import Geometry


def quantized_types(m: int, k: int, group: int) -> list[relax.TensorType]:
    """What `quantize` makes: q i8[m, spans, width], scale f32 and sum i32 [m, spans]."""
    g = Geometry(k, group)
    return [
        ops.tensor((m, g.spans, g.width), "int8"),
        ops.tensor((m, g.spans), "float32"),
        ops.tensor((m, g.spans), "int32"),
    ]


@tvm.transform.module_pass(opt_level=0, name="QuantizeActivations")
class QuantizeActivations:
    """linear_exact(x, w) -> linear_int8(quantize(x), w), for every kind of weight. Needs stage `graph`.

    Layers on one x with equal groups share one `quantize`. Dense linears stay.
    """

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        """PassContext is not used."""
        made: dict[tuple[relax.Expr, int], list[relax.Var]] = {}

        def rule(op: Op, context: Context) -> relax.Expr | None:
            if not op.name.startswith("linear_exact"):
                return None
            x, *weight = op.args
            m, k = ops.shape_of(x.ty)
            group = int(op.attrs["group"])
            if (x, group) not in made:
                triple = context.emit(ops.make("quantize", [x], {"group": group}, quantized_types(m, k, group)))
                made[x, group] = [context.emit(relax.TupleGetItem(triple, i)) for i in range(3)]
            name = op.name.replace("exact", "int8")
            return ops.make(name, [*made[x, group], *weight], op.attrs, op.results)

        return rewrite(mod, rule)
