"""Kernels for many tokens that compute only those rows that are real.

A prompt function has room for m tokens, and a call of it any number of them up to m: `span` i32[2] = (first position,
number of real rows) says how many. Shapes, buffers and tiles stay as they are; only loops over tokens get a length that
is known at run time:

    kernel(args..., outs...)                 ->   kernel(args..., span i32[2], outs...)
    for t in tiles of `tile` tokens: body    ->   for t in range(ceil(span[1] / tile) * times): body

A schedule marks those loops (`marks`), and this is a rewrite of its finished PrimFunc. A tile that is real in part
computes rows that nobody reads. Their inputs are whatever the buffers held: a marked loop's body may compute with it,
but must not use it as an address, nor write the KV cache by it. Kernels whose operator has the span already keep their
parameters. Loops over rows of weights stay as they are, and so do kernels of one token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import tvm
from tvm import s_tir, tirx
from tvm.script.ir_builder import tirx as T

if TYPE_CHECKING:
    from schedules.kernel import Kernel

TILE, TIMES = "quern.tile", "quern.times"
SPAN = "span"


def marks(tile: int = 1, times: int = 1) -> dict[str, Any]:
    """Annotations of a loop over tiles of `tile` tokens that takes `times` turns for each."""
    return {TILE: tirx.IntImm("int32", tile), TIMES: tirx.IntImm("int32", times)}


def real_tiles(m: int, tile: int) -> Any:
    """How many tiles of `tile` tokens are real, in a function that is being built: a marked loop counts them.

    LLVM makes a division of it.
    """
    count = T.alloc_buffer((1,), "int32", layout=None)
    T.buffer_store(count, T.int32(0), [0])
    with T.serial(m // tile, annotations=marks(tile)) as i:
        T.buffer_store(count, i + 1, [0])
    return count[0]


def counted(kernel: Kernel, arguments: int) -> Kernel:
    """The kernel with its marked loops bounded by the real rows; the same kernel if it has none.

    arguments: how many parameters stand before the outputs.
    """
    function = kernel.func
    span = next((param for param in function.params if param.name == SPAN), None)
    given = span is not None
    if not given:
        span = tirx.decl_buffer((2,), "int32", SPAN, layout=None)
    body = _bounded(function.body, span)
    if body.same_as(function.body):
        return kernel
    params = list(function.params)
    if not given:
        params.insert(arguments, span)
        body = _reading(body, span)
    made = tirx.PrimFunc(params, body, function.ret_type, function.attrs)
    return replace(kernel, func=made, counted=not given)


def _bounded(statement: Any, span: Any) -> Any:
    """The statement with marked loops bounded; the very same where there is none. Marked loops do not hold others."""
    if isinstance(statement, tirx.For):
        if TILE in statement.annotations:
            return _with_real_tiles(statement, span)
        body = _bounded(statement.body, span)
        if body.same_as(statement.body):
            return statement
        return tirx.For(
            statement.loop_var, statement.min, statement.extent, statement.kind, body, statement.thread_binding,
            statement.annotations,
        )  # fmt: skip
    if isinstance(statement, tirx.SeqStmt):
        parts = [_bounded(part, span) for part in statement.seq]
        same = all(part.same_as(old) for part, old in zip(parts, statement.seq, strict=True))
        return statement if same else tirx.SeqStmt(parts)
    if isinstance(statement, tirx.IfThenElse):
        then, other = statement.then_case, statement.else_case
        new = [None if case is None else _bounded(case, span) for case in (then, other)]
        same = then.same_as(new[0]) and (other is None or other.same_as(new[1]))
        return statement if same else tirx.IfThenElse(statement.condition, *new)
    if isinstance(statement, tirx.AttrStmt):
        body = _bounded(statement.body, span)
        if body.same_as(statement.body):
            return statement
        return tirx.AttrStmt(statement.node, statement.attr_key, statement.value, body)
    if isinstance(statement, s_tir.SBlockRealize):
        body = _bounded(statement.block.body, span)
        if body.same_as(statement.block.body):
            return statement
        return s_tir.SBlockRealize(statement.iter_values, statement.predicate, _block(statement.block, body=body))
    return statement


def _with_real_tiles(loop: Any, span: Any) -> Any:
    """A marked loop, over what is real."""
    annotations = dict(loop.annotations)
    tile, times = int(annotations.pop(TILE)), int(annotations.pop(TIMES))
    assert int(loop.min) == 0, "a marked loop begins at 0"
    tiles = tirx.floordiv(tirx.BufferLoad(span, [1]) + (tile - 1), tile)
    return tirx.For(loop.loop_var, 0, tiles * times, loop.kind, loop.body, loop.thread_binding, annotations)


def _reading(root: Any, span: Any) -> Any:
    """The root block, which says that it reads the span."""
    region = tirx.BufferRegion(span, [tvm.ir.Range(0, 2)])
    return s_tir.SBlockRealize(root.iter_values, root.predicate, _block(root.block, reads=[*root.block.reads, region]))


def _block(block: Any, **changed: Any) -> Any:
    names = ("iter_vars", "reads", "writes", "name_hint", "body", "init", "alloc_buffers", "match_buffers")
    return s_tir.SBlock(*(changed.get(name, getattr(block, name)) for name in (*names, "annotations")))
