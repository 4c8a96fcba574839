"""Tasks that may move between threads: each is done once, whatever the number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules.balance import balanced

COUNTS = """
import sys
import numpy as np, tvm
from tests.schedules.kernels import NATIVE
from tests.schedules.test_balance import counting
from schedules.balance import balanced
for tasks in map(int, sys.argv[1:]):
    run = tvm.compile(tvm.IRModule({"main": balanced(counting(tasks))}), tvm.target.Target(NATIVE.tvm_target()))["main"]
    seen = tvm.runtime.tensor(np.zeros((tasks, 16), np.int32))
    for _ in range(200):
        run(seen)
    assert (seen.numpy() == 200 * np.arange(1, 17)).all(), tasks
"""


def counting(tasks: int) -> Any:
    """out[i, j] += j + 1 in task i, by way of a buffer of the task's own."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        out = T.arg("out", T.buffer((tasks, 16), "int32"))
        with T.sblock("root"):
            own = T.sblock_alloc_buffer((tasks, 16), "int32")
            with T.parallel(0, tasks) as i:
                for source, target in ((None, own), (own, out)):
                    with T.serial(0, 16) as j, T.sblock("step"):
                        vi, vj = T.axis.remap("SS", [i, j])
                        value = vj + 1 if source is None else out[vi, vj] + own[vi, vj]
                        T.buffer_store(target, value, [vi, vj])
    return builder.get()


@pytest.mark.parametrize("threads", [1, 3])
def test_every_task_once(threads: int) -> None:
    """More tasks than threads, fewer, and more flags than lie on the stack. A process has one number of threads."""
    tasks = [str(n) for n in (1, 2, 7, 1100)]
    environment = {**os.environ, "TVM_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", COUNTS, *tasks], env=environment, check=True, timeout=300)


def test_only_a_parallel_loop() -> None:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        out = T.arg("out", T.buffer((4,), "int32"))
        with T.sblock("root"), T.serial(0, 4) as i, T.sblock("one"):
            T.buffer_store(out, 1, [T.axis.spatial(4, i)])
    with pytest.raises(AssertionError, match="the root is no parallel loop"):
        balanced(builder.get())
