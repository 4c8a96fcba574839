"""What may exist at each stage, checked between passes. A failure is a bug of quern, so it asserts."""

from __future__ import annotations

import tvm
from tvm import relax

from compiler.graph import ops

STAGES = ("graph", "fused", "scheduled")


def verify(mod: tvm.IRModule, stage: str) -> None:
    """One dataflow block of tuple reads and: @graph, @fused known operators only; @scheduled call_tir only."""
    assert stage in STAGES, stage
    relax.analysis.well_formed(mod)  # raises
    for var, function in mod.functions_items():
        if isinstance(function, relax.Function):
            where, blocks = f"@{stage} {var.name_hint}", function.body.blocks
            assert len(blocks) == 1 and isinstance(blocks[0], relax.DataflowBlock), f"{where}: not one dataflow block"
            for binding in blocks[0].bindings:
                _verify_value(binding.value, where, stage == "scheduled")


def _verify_value(value: relax.Expr, where: str, scheduled: bool) -> None:
    if isinstance(value, relax.Var | relax.TupleGetItem):
        return
    assert isinstance(value, relax.Call), f"{where}: unexpected {type(value).__name__}"
    op = ops.match(value)
    if scheduled:
        name = getattr(value.op, "name", "")
        assert op is None and name in ("relax.call_tir", "relax.call_tir_inplace"), f"{where}: {value} was not lowered"
    else:
        assert op is not None, f"{where}: {value} is no known operator"
