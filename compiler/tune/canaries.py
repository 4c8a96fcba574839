"""Kernels that are timed beside candidates on a board, because no knob changes them.

The readers of compiler/measure/read_bandwidth.py watch the memory. `spin` watches the clock: every thread turns a
number over, one dependent instruction after the other, and touches no memory. When a board throttles, or somebody else
takes its processors, it takes longer.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from compiler.measure import read_bandwidth
from compiler.tune.candidates import READ_BYTES

SLICES = read_bandwidth.SLICES
# Steps of a slice: three shifts and three exclusive ors that wait for each other, 6 to 9 cycles. 64 slices of 4096 are
# 0.3 ms for four threads of a Cortex-A72 at 1.5 GHz.
STEPS = 4096
SPIN, READER = "spin", "read_{}"


def functions() -> dict[str, Any]:
    """All of them, by name."""
    readers = enumerate(read_bandwidth.VARIANTS)
    made = {READER.format(i): read_bandwidth.kernel(READ_BYTES, *variant) for i, variant in readers}
    return made | {SPIN: spin()}


def spin() -> Any:
    """spin(out i32[64]): xorshift32 from s + 1, STEPS times, for slice s."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"tirx.noalias": True, "global_symbol": SPIN})
            out = T.arg("out", T.buffer((SLICES,), "int32", layout=None))
            with T.parallel(0, SLICES) as s:
                with T.sblock("slice"):
                    vs = T.axis.spatial(SLICES, s)
                    T.reads()
                    T.writes(out[vs])
                    x = T.sblock_alloc_buffer((1,), "uint32")
                    T.buffer_store(x, T.Cast("uint32", vs + 1), [0])
                    with T.serial(0, STEPS):
                        for left, by in ((True, 13), (False, 17), (True, 5)):
                            shift = T.shift_left if left else T.shift_right
                            T.buffer_store(x, T.bitwise_xor(x[0], shift(x[0], T.uint32(by))), [0])
                    T.buffer_store(out, T.reinterpret("int32", x[0]), [vs])
    return builder.get()
