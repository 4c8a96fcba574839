"""Rewriting of operator calls: what every pass over `quern.*` operators shares.

A graph function is one dataflow block of operator calls and tuple reads. `rewrite` walks it once, from the first
binding to the last, and asks a rule about each call; producers that nobody uses any more disappear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import tvm
from tvm import relax

from compiler.graph import ops
from compiler.graph.ops import Op


class Context:
    """What a rule may ask about the function under rewriting."""

    def __init__(
        self, builder: relax.BlockBuilder, uses: Mapping[relax.Var, int], function: str, params: Sequence[relax.Var]
    ) -> None:
        self.builder = builder
        self.function = function  # name of the function under rewriting
        self.params = {param.name: param for param in params}  # of the new function
        self.original: relax.Var | None = None  # variable of the old function that the call at hand is bound to
        self._old_uses = uses
        self._made: dict[relax.Var, tuple[Op, int]] = {}

    def producer(self, value: relax.Expr) -> Op | None:
        """The call that made `value`, or None when it is no operator call or has a second user."""
        op, uses = self._made.get(value, (None, 0))
        return op if uses == 1 else None

    def emit(self, value: relax.Expr) -> relax.Var:
        """Bind an expression before the call at hand."""
        return self.builder.emit(value)

    def remember(self, new: relax.Var, old: relax.Var) -> None:
        """Note what `new`, which stands for `old`, was made by."""
        op = ops.match(self.builder.lookup_binding(new))
        if op is not None:
            self._made[new] = (op, self._old_uses[old])


Rule = Callable[[Op, Context], relax.Expr | None]


def rewrite(mod: tvm.IRModule, rule: Rule, retype: Callable[[relax.Var], relax.Var] | None = None) -> tvm.IRModule:
    """A new module: `rule` applied to each operator call, None leaves the call. `retype` replaces parameters."""
    builder = relax.BlockBuilder()
    for var, function in mod.functions_items():
        if isinstance(function, relax.Function):
            _rewrite_function(builder, var.name_hint, function, rule, retype)
        else:
            builder.add_func(function, var.name_hint)
    made = builder.get()
    for var, function in made.functions_items():
        if isinstance(function, relax.Function):
            made.update_func(var, relax.analysis.remove_all_unused(function))
    return made


def _rewrite_function(
    builder: relax.BlockBuilder,
    name: str,
    function: relax.Function,
    rule: Rule,
    retype: Callable[[relax.Var], relax.Var] | None,
) -> None:
    (block,) = function.body.blocks
    params = [retype(p) if retype else p for p in function.params]
    context = Context(builder, _count_uses(block.bindings, function.body.body), name, params)
    new: dict[relax.Var, relax.Expr] = dict(zip(function.params, params, strict=True))
    with builder.function(name, params):
        with builder.dataflow():
            for binding in block.bindings:
                value = _substitute(binding.value, new)
                if isinstance(value, relax.Var):  # another name, as emit_output makes one: no need for a third
                    new[binding.var] = value
                    continue
                op = ops.match(value)
                context.original = binding.var
                replaced = rule(op, context) if op is not None else None
                result = builder.emit(value if replaced is None else replaced)
                context.remember(result, binding.var)
                new[binding.var] = result
            output = builder.emit_output(new[function.body.body])
        made = builder.emit_func_output(output)
    builder.update_func(made, builder.get()[made].with_attrs(dict(function.attrs or {})))


def _substitute(value: relax.Expr, new: Mapping[relax.Var, relax.Expr]) -> relax.Expr:
    if isinstance(value, relax.Call):
        return relax.Call(value.op, [new.get(arg, arg) for arg in value.args], value.attrs, value.ty_args)
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(new.get(value.tuple_value, value.tuple_value), value.index)
    assert isinstance(value, relax.Var), f"a graph has operator calls and tuple reads, not {type(value).__name__}"
    return new.get(value, value)


def _count_uses(bindings: list[relax.Binding], result: relax.Var) -> Counter[relax.Var]:
    """Uses under any name count for the variable that was bound first."""
    first: dict[relax.Var, relax.Var] = {}
    uses: Counter[relax.Var] = Counter()
    for binding in bindings:
        value = binding.value
        if isinstance(value, relax.Call):
            uses.update(first.get(arg, arg) for arg in value.args if isinstance(arg, relax.Var))
        elif isinstance(value, relax.TupleGetItem):
            uses[first.get(value.tuple_value, value.tuple_value)] += 1
        elif isinstance(value, relax.Var):
            first[binding.var] = first.get(value, value)
    uses[first.get(result, result)] += 1
    return uses
