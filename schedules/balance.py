"""Parallel loops whose tasks are handed out one by one, to whichever thread is free.

TVM cuts a parallel loop into equal pieces, one a thread. Threads are not equal: another process takes one's CPU for a
moment, or the other half of its core, and then all others wait at the end of every kernel.

    for i in parallel(E): body(i)   ->   following = 0
                                         for thread in parallel(min(E, MOST_THREADS)):
                                             mine = take(following, E)
                                             if mine < E:
                                                 for i in serial(E):
                                                     if i == mine: body(i); mine = take(following, E)

A thread's tasks come in rising order, so that one pass over all numbers finds them; and i stays the variable of a loop,
which TVM needs to see how large a task's buffers are. Whichever thread computes a task, the same operations give the
same bits. TVM has no atomic addition for CPUs, LLVM has: `take` comes as LLVM IR, and is inlined. It gives E once
nothing is left, and then only reads.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

MOST_THREADS = 256
LINE_WORDS = 16  # that many before and behind the counter: nothing else lies in its cache line
TAKE = "quern_take"
IR = f"""
define i32 @{TAKE}(ptr %next, i32 %end) {{
  %seen = load atomic i32, ptr %next monotonic, align 4
  %over = icmp sge i32 %seen, %end
  br i1 %over, label %none, label %some
some:
  %mine = atomicrmw add ptr %next, i32 1 monotonic, align 4
  ret i32 %mine
none:
  ret i32 %end
}}
"""


def balanced(function: Any) -> Any:
    """The scheduled PrimFunc, whose root block is one parallel loop from 0, with that loop's tasks handed out."""
    realize = function.body
    root = realize.block
    loop = root.body
    assert isinstance(loop, tirx.For) and loop.kind == tirx.ForKind.PARALLEL, "the root is no parallel loop"
    following = tirx.decl_buffer((2 * LINE_WORDS,), "int32", "following", layout=None)
    mine = tirx.decl_buffer((1,), "int32", "mine", layout=None)
    end = loop.extent
    place = tirx.call_intrin("handle", "tirx.address_of", tirx.BufferLoad(following, [LINE_WORDS]))
    take = tirx.BufferStore(mine, tirx.call_extern("int32", TAKE, place, end), [0])
    task = tirx.BufferLoad(mine, [0])
    ours = tirx.IfThenElse(loop.loop_var.equal(task), tirx.SeqStmt([loop.body, take]), None)
    search = tirx.For(loop.loop_var, 0, end, tirx.ForKind.SERIAL, ours)
    working = tirx.SeqStmt([tirx.AllocBuffer(mine), take, tirx.IfThenElse(task < end, search, None)])
    count = min(int(end), MOST_THREADS)
    threads = tirx.For(tirx.Var("thread", "int32"), 0, count, tirx.ForKind.PARALLEL, working)
    imported = tirx.AttrStmt(0, "pragma_import_llvm", tvm.ir.StringImm(IR), threads)
    start = tirx.BufferStore(following, 0, [LINE_WORDS])
    whole = tirx.SeqStmt([tirx.AllocBuffer(following), start, imported])
    block = s_tir.SBlock(
        root.iter_vars, root.reads, root.writes, root.name_hint, whole, root.init, root.alloc_buffers,
        root.match_buffers, root.annotations,
    )  # fmt: skip
    return function.with_body(s_tir.SBlockRealize(realize.iter_values, realize.predicate, block))
