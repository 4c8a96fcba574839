"""Every operator becomes a scheduled kernel of this target; weight parameters take the layout their kernel wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tvm
from tvm import relax

from compiler.errors import UnsupportedError
from compiler.graph import ops
from compiler.graph.ops import Op
from compiler.passes.rewrite import Context, rewrite
from compiler.quant.grids import GRIDS
from schedules.kernel import Kernel, Packing, Request, TensorSpec, Unsupported, lowerings
from targets import Target

TILED = "_amx"


@dataclass(frozen=True)
class Lowered:
    """The module of `call_tir`s, and the layout of every weight parameter that changed, by parameter name.

    tiled: names of functions that there are twice, and of their second form, which needs what an OS may refuse.
    """

    mod: tvm.IRModule
    packings: Mapping[str, Packing]
    tiled: Mapping[str, str]


def lower_to_schedules(mod: tvm.IRModule, target: Target) -> Lowered:
    """quern.OP(args) -> call_tir(kernel, args). Needs stage `fused`; leaves no `quern.*` call.

    What an operating system may refuse a process (AMX tiles), only second forms of functions use: NAME_amx is NAME with
    the kernels of the whole target, and is there when one of them is another. All other kernels are the plain target's.
    Raises UnsupportedError when the target has no schedule for an operator. Two kernels that want one weight in two
    layouts are a bug in schedules/.
    """
    table = lowerings()
    kernels: dict[tuple[object, ...], Kernel] = {}
    packings: dict[str, Packing] = {}

    def kernel_for(op: Op, device: Target) -> Kernel:
        request = _request(op, device)
        key = (device.features, request.op, request.args, request.outs, tuple(request.attrs.items()))
        if key not in kernels:
            try:
                kernels[key] = table[request.op](request)
            except Unsupported as error:
                raise UnsupportedError(f"{target.name}: {error}") from error
        return kernels[key]

    tiled: dict[str, str] = {}

    def compare(op: Op, context: Context) -> None:
        if kernel_for(op, target).name != kernel_for(op, target.plain).name:
            tiled[context.function] = f"{context.function}{TILED}"

    if target != target.plain:
        rewrite(mod, compare)
        mod = _with_copies(mod, tiled)
    chosen: dict[relax.Var, Kernel] = {}

    def choose(op: Op, context: Context) -> None:
        kernel = kernel_for(op, target if context.function in tiled.values() else target.plain)
        chosen[context.original] = kernel
        for index, packing in kernel.packings.items():
            name = op.args[index].name
            known = packings.setdefault(name, packing)
            assert known.name == packing.name and known.spec == packing.spec, f"{name}: {known.name} and {packing.name}"

    rewrite(mod, choose)

    def retype(param: relax.Var) -> relax.Var:
        packing = packings.get(param.name)
        return param if packing is None else relax.Var(param.name, ops.tensor(packing.spec.shape, packing.spec.dtype))

    def call(op: Op, context: Context) -> relax.Expr:
        kernel = chosen[context.original]
        function = context.builder.add_func(kernel.func.without_attr("global_symbol"), kernel.name)
        written = [op.signature.args.index(arg) for arg in op.signature.inplace]
        types = list(op.results)
        if written:
            indices = [-1] * (len(types) - len(written)) + written
            return relax.op.call_tir_inplace(function, relax.Tuple(op.args), indices, types)
        return relax.call_tir(function, relax.Tuple(op.args), types if len(types) > 1 else types[0])

    return Lowered(rewrite(mod, call, retype), packings, tiled)


def _with_copies(mod: tvm.IRModule, names: Mapping[str, str]) -> tvm.IRModule:
    """The module with a copy of each named function under its second name. Copies have variables of their own."""
    functions = {var.name_hint: function for var, function in mod.functions_items()}
    for name, copy in names.items():
        function = relax.utils.copy_with_new_vars(functions[name])
        functions[copy] = function.with_attr("global_symbol", copy)
    return tvm.IRModule(functions)


def _request(op: Op, target: Target) -> Request:
    written = len(op.signature.inplace)
    fresh = op.results[: len(op.results) - written]
    return Request(
        op=ops.PREFIX + op.name,
        args=tuple(_spec(arg.ty) for arg in op.args),
        outs=tuple(_spec(t) for t in fresh),
        attrs=dict(op.attrs),
        target=target,
        table=GRIDS[str(op.attrs["grid"])].values if "grid" in op.attrs else None,
    )


def _spec(type_: relax.TensorType) -> TensorSpec:
    return TensorSpec(ops.shape_of(type_), str(type_.dtype))
