"""Every operator becomes a scheduled kernel of this target; weight parameters take the layout their kernel wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import tvm
from tvm import relax

from compiler.errors import UnsupportedError
from compiler.graph import ops
from compiler.graph.ops import Op
from compiler.passes.rewrite import Context, rewrite
from compiler.quant.grids import GRIDS
from schedules.counted import SPAN
from schedules.kernel import Kernel, Packing, Request, TensorSpec, Unsupported, lowerings
from targets import Target

TILED = "_amx"


@dataclass(frozen=True)
class Decision:
    """Knobs that are better than a schedule's default, and the name of the record that says so.

    modelled: by the cycles of a model; False: by measured times.
    """

    knobs: Mapping[str, int]
    record: str
    modelled: bool = False


Decide = Callable[[Request], Decision | None]


@dataclass(frozen=True)
class Lowered:
    """The module of `call_tir`s, and the layout of every weight parameter that changed, by parameter name.

    tiled: names of functions that there are twice, and of their second form, which needs what an OS may refuse.
    tuned: decisions that were applied, by kernel name.
    """

    mod: tvm.IRModule
    packings: Mapping[str, Packing]
    tiled: Mapping[str, str]
    tuned: Mapping[str, Decision]


def requests(mod: tvm.IRModule, target: Target) -> dict[str, list[Request]]:
    """What each function of a module of stage `fused` would ask of the schedules, in order, each request once."""
    found: dict[str, list[Request]] = {}
    for var, function in mod.functions_items():
        if isinstance(function, relax.Function):
            calls = (ops.match(b.value) for block in function.body.blocks for b in block.bindings)
            asked = {key_of(r): r for r in (request_of(op, target) for op in calls if op is not None)}
            found[var.name_hint] = list(asked.values())
    return found


def lower_to_schedules(mod: tvm.IRModule, target: Target, decide: Decide = lambda request: None) -> Lowered:
    """quern.OP(args) -> call_tir(kernel, args). Needs stage `fused`; leaves no `quern.*` call.

    `decide` gives the knobs of a request, or None for the schedule's default.
    What an operating system may refuse a process (AMX tiles), only second forms of functions use: NAME_amx is NAME with
    the kernels of the whole target, and is there when one of them is another. All other kernels are the plain target's.
    Counted kernels are given the function's parameter `span`, so a function of several tokens has one.
    Raises UnsupportedError when the target has no schedule for an operator. Two kernels that want one weight in two
    layouts are a bug in schedules/.
    """
    table = lowerings()
    kernels: dict[tuple[object, ...], Kernel] = {}
    packings: dict[str, Packing] = {}
    tuned: dict[str, Decision] = {}

    def kernel_for(op: Op, device: Target) -> Kernel:
        request = request_of(op, device)
        key = key_of(request)
        if key not in kernels:
            try:
                decision = decide(request)
                knobs = request.knobs if decision is None else decision.knobs
                kernels[key] = table[request.op](replace(request, knobs=knobs))
            except Unsupported as error:
                raise UnsupportedError(f"{target.name}: {error}") from error
            if decision is not None:
                tuned[kernels[key].name] = decision
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
        args = [*op.args, context.params[SPAN]] if kernel.counted else op.args
        written = [op.signature.args.index(arg) for arg in op.signature.inplace]
        types = list(op.results)
        if written:
            indices = [-1] * (len(types) - len(written)) + written
            return relax.op.call_tir_inplace(function, relax.Tuple(args), indices, types)
        return relax.call_tir(function, relax.Tuple(args), types if len(types) > 1 else types[0])

    return Lowered(rewrite(mod, call, retype), packings, tiled, tuned)


def _with_copies(mod: tvm.IRModule, names: Mapping[str, str]) -> tvm.IRModule:
    """The module with a copy of each named function under its second name. Copies have variables of their own."""
    functions = {var.name_hint: function for var, function in mod.functions_items()}
    for name, copy in names.items():
        function = relax.utils.copy_with_new_vars(functions[name])
        functions[copy] = function.with_attr("global_symbol", copy)
    return tvm.IRModule(functions)


def request_of(op: Op, target: Target) -> Request:
    """What an operator call asks of the schedules of this target."""
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


def key_of(request: Request) -> tuple[object, ...]:
    """Equal for requests that are answered alike on one target."""
    return (request.target.features, request.op, request.args, request.outs, tuple(request.attrs.items()))


def _spec(type_: relax.TensorType) -> TensorSpec:
    return TensorSpec(ops.shape_of(type_), str(type_.dtype))
