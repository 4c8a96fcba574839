"""Parallel loops whose tasks may move to whichever thread is free, and otherwise stay in one piece a thread.

TVM cuts a parallel loop into equal pieces, one a thread. Threads are not equal: another process takes one's CPU for a
moment, or the other half of its core, and then all others wait at the end of every kernel. Tasks handed out one by one
to whoever is free mend that, but neighbours then go to different threads: each thread's hardware prefetcher runs on
into weights that another one reads, and starts anew at every task. Hence both: a thread does its own piece, from front
to back, then what others have not begun.

    for i in parallel(E): body(i)   ->   taken[0..E-1] = 0
                                         for front in parallel(F):
                                             if not all_taken:
                                                 for again in serial(2), i in serial(E):
                                                     if (again or i >= front * E / F) and take(taken[i]): body(i)
                                                 all_taken = 1

A thread's first iteration stands at the front of its piece, and does all that it ever does; the others find nothing
left, but TVM takes and gives back a task's memory in each: hence no more of them than threads might need. It runs
upwards into what the next thread has begun, passes over that, and helps where tasks are free. i stays the variable of
a loop, which TVM needs to see how large a task's buffers are. Whichever thread computes a task, the same operations
give the same bits. TVM has no atomic exchange for CPUs, LLVM has: `take` comes as LLVM IR, and is inlined. It is 1
for the one that comes first.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

LINE_BYTES = 64
FRONTS = 128  # places where a thread may begin
TAKE = "quern_take"
IR = f"""
define i32 @{TAKE}(ptr %flag) {{
  %seen = load atomic i8, ptr %flag monotonic, align 1
  %free = icmp eq i8 %seen, 0
  br i1 %free, label %try, label %over
try:
  %before = atomicrmw xchg ptr %flag, i8 1 monotonic, align 1
  %first = icmp eq i8 %before, 0
  %mine = zext i1 %first to i32
  ret i32 %mine
over:
  ret i32 0
}}
"""


def balanced(function: Any) -> Any:
    """The scheduled PrimFunc, whose root block is one parallel loop from 0, with that loop's tasks free to move."""
    realize = function.body
    root = realize.block
    loop = root.body
    assert isinstance(loop, tirx.For) and loop.kind == tirx.ForKind.PARALLEL, "the root is no parallel loop"
    end = int(loop.extent)
    # Behind the tasks' flags is the one that says that all are taken; a line on either side keeps others' data away.
    lines = -(-(end + 1) // LINE_BYTES)
    taken = tirx.decl_buffer(((1 + lines + 1) * LINE_BYTES,), "uint8", "taken", layout=None)
    line = tirx.Var("line", "int32")
    none, place = tirx.Broadcast(tirx.const(0, "uint8"), LINE_BYTES), tirx.Ramp((1 + line) * LINE_BYTES, 1, LINE_BYTES)
    clear = tirx.For(line, 0, lines, tirx.ForKind.SERIAL, tirx.BufferStore(taken, none, [place]))
    threads = tirx.AttrStmt(0, "pragma_import_llvm", tvm.ir.StringImm(IR), _threads(loop, taken))
    whole = tirx.SeqStmt([tirx.AllocBuffer(taken), clear, threads])
    block = s_tir.SBlock(
        root.iter_vars, root.reads, root.writes, root.name_hint, whole, root.init, root.alloc_buffers,
        root.match_buffers, root.annotations,
    )  # fmt: skip
    return function.with_body(s_tir.SBlockRealize(realize.iter_values, realize.predicate, block))


def _threads(loop: Any, taken: Any) -> Any:
    """The parallel loop that a thread enters at the front of its piece."""
    task, end = loop.loop_var, loop.extent
    front, again = tirx.Var("front", "int32"), tirx.Var("again", "int32")
    fronts = min(int(end), FRONTS)
    first = tirx.floordiv(front * end, fronts)
    flag = tirx.call_intrin("handle", "tirx.address_of", tirx.BufferLoad(taken, [LINE_BYTES + task]))
    free = tirx.call_extern("int32", TAKE, flag) > 0
    ours = tirx.IfThenElse(tirx.any(again > 0, task >= first), tirx.IfThenElse(free, loop.body, None), None)
    tasks = tirx.For(again, 0, 2, tirx.ForKind.SERIAL, tirx.For(task, 0, end, tirx.ForKind.SERIAL, ours))
    all_taken, yes = tirx.BufferLoad(taken, [LINE_BYTES + end]), tirx.const(1, "uint8")
    done = tirx.BufferStore(taken, yes, [LINE_BYTES + end])
    working = tirx.IfThenElse(all_taken < yes, tirx.SeqStmt([tasks, done]), None)
    return tirx.For(front, 0, fronts, tirx.ForKind.PARALLEL, working)
