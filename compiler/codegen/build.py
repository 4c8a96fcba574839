"""Scheduled Relax module to a VM executable, and the memory that its static plan needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from compiler.codegen.share_tensors import share_tensors
from targets import Target

PAGE_BYTES = 4096  # TVM's pooled allocator hands out whole pages


@dataclass(frozen=True)
class Compiled:
    """A finished executable; `activation_bytes` bounds what its functions allocate, whatever their order."""

    executable: Any
    activation_bytes: int


def compile_module(mod: tvm.IRModule, target: Target) -> Compiled:
    """Plan memory and generate code. Needs stage `scheduled`."""
    machine = tvm.target.Target(target.tvm_target())
    with machine, tvm.transform.PassContext(opt_level=3):
        whole = tvm.transform.Sequential(
            [
                relax.transform.ToNonDataflow(),
                relax.transform.RemovePurityChecking(),
                relax.transform.CallTIRRewrite(),
                relax.transform.StaticPlanBlockMemory(),
            ]
        )(mod)
        planned = share_tensors(whole)
        lowering = tvm.transform.Sequential(
            [
                relax.transform.LowerAllocTensor(),
                relax.transform.LowerRuntimeBuiltin(),
                relax.transform.ComputePrimValue(),
                relax.transform.VMShapeLower(),
                relax.transform.AttachGlobalSymbol(),
            ]
        )
        executable = relax.build(planned, machine, relax_pipeline=lowering, exec_mode="bytecode")
    return Compiled(executable, _planned_bytes(planned))


def _planned_bytes(mod: tvm.IRModule) -> int:
    """Peak of the pooled allocator: buffers of equal size are shared by all functions, others are kept side by side."""
    pool: Counter[int] = Counter()
    for _, function in mod.functions_items():
        if isinstance(function, relax.Function):
            pool |= _storages(function)
    return sum(size * count for size, count in pool.items())


def _storages(function: relax.Function) -> Counter[int]:
    sizes: Counter[int] = Counter()

    def visit(expr: object) -> None:
        if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") in (
            "relax.memory.alloc_storage",
            "relax.builtin.alloc_tensor",
        ):
            shape = [int(x) for x in expr.args[0].values]
            item = 1 if expr.op.name == "relax.memory.alloc_storage" else tvm.DataType(str(expr.args[1].value)).itemsize
            total = item
            for extent in shape:
                total *= extent
            sizes[-(-total // PAGE_BYTES) * PAGE_BYTES] += 1

    relax.analysis.post_order_visit(function, visit)
    return sizes
