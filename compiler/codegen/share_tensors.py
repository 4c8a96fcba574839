"""A planned function allocates each tensor once: what has the same place, shape and element type is the same tensor.

    alloc = R.memory.alloc_tensor(storage, 0, (1, 64), "float32")       alloc = R.memory.alloc_tensor(storage, 0, ...)
    f(x, alloc)                                                         f(x, alloc)
    t = (alloc, other); a = t[0]; b = a                           ->
    g(b, y)                                                             g(alloc, y)
    alloc1 = R.memory.alloc_tensor(storage, 0, (1, 64), "float32")
    h(y, alloc1)                                                        h(y, alloc)

Runs behind StaticPlanBlockMemory, which decided when memory may be used again: tensors are names of it, and a second
name is an object that the virtual machine makes in every layer of every token. Nor is any let go of before the function
returns (KillAfterLastUse): that takes a call each, and memory is planned as if all storages lived at once.
Needs functions that are one straight line of bindings and give a tensor. What is allocated to be given away (not from a
planned storage) stays as it is.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

PLANNED = "relax.memory.alloc_tensor"


def share_tensors(mod: tvm.IRModule) -> tvm.IRModule:
    """The module with its Relax functions rewritten."""
    made = mod.clone()
    for var, function in mod.functions_items():
        if isinstance(function, relax.Function):
            made.update_func(var, _rewritten(function))
    return relax.transform.Normalize()(made)  # gives new calls their types


def _rewritten(function: relax.Function) -> relax.Function:
    same: dict[relax.Var, Any] = {}  # what a variable stands for: another variable, or a tuple's elements
    tensors: dict[tuple[Any, ...], relax.Var] = {}
    kept = []
    for block in function.body.blocks:
        for binding in block.bindings:
            value = _substituted(binding.value, same)
            if isinstance(value, (relax.Var, relax.Tuple)):
                same[binding.var] = value
                continue
            if isinstance(value, relax.Call) and getattr(value.op, "name", "") == PLANNED:
                storage, *where = value.args
                key = (storage, *map(str, where))
                if key in tensors:
                    same[binding.var] = tensors[key]
                    continue
                tensors[key] = binding.var
            kept.append(relax.VarBinding(binding.var, value))
    result = same.get(function.body.body, function.body.body)
    assert isinstance(result, relax.Var), "a function gives one tensor"
    body = relax.SeqExpr([relax.BindingBlock(kept)], result)
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


def _substituted(value: relax.Expr, same: dict[relax.Var, Any]) -> relax.Expr:
    def of(expr: Any) -> Any:
        return same.get(expr, expr) if isinstance(expr, relax.Var) else expr

    if isinstance(value, relax.Call):
        args = [of(arg) for arg in value.args]
        assert not any(isinstance(arg, relax.Tuple) for arg in args), "a kernel takes tensors"
        return relax.Call(value.op, args, value.attrs, value.ty_args)
    if isinstance(value, relax.TupleGetItem):
        whole = of(value.tuple_value)
        assert isinstance(whole, relax.Tuple), "only a tuple that was made here is taken apart"
        return whole.fields[value.index]
    if isinstance(value, relax.Tuple):
        return relax.Tuple([of(field) for field in value.fields])
    return of(value)
