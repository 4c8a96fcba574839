"""What may exist at each stage, checked between passes. A failure is a bug of quern, so it asserts."""

from __future__ import annotations

import tvm
from tvm import relax

from compiler.graph import ops

STAGES = ("graph", "fused", "scheduled")


def verify(mod: tvm.IRModule, stage: str) -> None:
    """graph, fused: only known operators and tuple reads; scheduled: only call_tir and tuple reads."""
    assert stage in STAGES, stage
    relax.analysis.well_formed(mod)  # raises
    for var, function in mod.functions_items():
        if isinstance(function, relax.Function):
            for block in function.body.blocks:
                for binding in block.bindings:
                    _verify_value(binding.value, f"@{stage} {var.name_hint}", stage == "scheduled")


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
