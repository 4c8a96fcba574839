"""A kernel that only reads: the ceiling for whatever must stream its weights once a token.

It runs in the same threads, over the same mapped file, as decoding does. A thread takes a slice of the bytes at a time
and reads `streams` places of it at once, with or without prefetching. The fastest variant counts: the ceiling must not
be our reader's weakness.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from compiler.codegen import link
from compiler.graph import ops
from targets import Target

LANES = 16
LINE = 64  # bytes
VARIANTS = ((1, 0), (4, 0), (8, 0), (4, 1), (4, 2), (8, 2))  # streams, cache level prefetched into (0: none)
PREFETCH_BYTES = 1024
SLICES = 64  # pieces handed to the threads


def usable(nbytes: int) -> int:
    """The largest part of `nbytes` that every number of streams divides into whole lines."""
    unit = SLICES * max(streams for streams, _ in VARIANTS) * LINE
    return nbytes // unit * unit


def build(nbytes: int, target: Target, out: Path) -> list[str]:
    """Write a library; give its functions' names. Each takes data i32[nbytes / 4] and gives an i32[64, 16]."""
    assert nbytes == usable(nbytes), nbytes
    builder = relax.BlockBuilder()
    names = []
    for streams, level in VARIANTS:
        data = relax.Var("data", ops.tensor((nbytes // 4,), "int32"))
        names.append(f"read_{streams}_{level}")
        with builder.function(names[-1]):
            reader = builder.add_func(
                kernel(nbytes, streams, level).without_attr("global_symbol"), f"reader_{streams}_{level}"
            )
            result = builder.emit(relax.call_tir(reader, relax.Tuple([data]), ops.tensor((SLICES, LANES), "int32")))
            builder.emit_func_output(result, params=[data])
    executable = relax.build(builder.get(), tvm.target.Target(target.tvm_target()))
    link.export(executable, out, target)
    return names


def kernel(nbytes: int, streams: int, level: int) -> Any:
    """read(data i32[nbytes / 4], out i32[64, 16]): the exclusive or of all words, slice by slice."""
    part = nbytes // SLICES // streams
    lanes = T.ramp(0, 1, LANES)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"tirx.noalias": True, "global_symbol": "read"})
            data = T.arg("data", T.buffer((nbytes // 4,), "int32", layout=None))
            out = T.arg("out", T.buffer((SLICES, LANES), "int32", layout=None))
            with T.parallel(0, SLICES) as s:
                with T.sblock("slice"):
                    vs = T.axis.spatial(SLICES, s)
                    T.reads(data[0 : nbytes // 4])
                    T.writes(out[vs, 0:LANES])
                    acc = T.sblock_alloc_buffer((4, LANES), "int32")
                    for a in range(4):
                        T.buffer_store(acc, T.broadcast(T.int32(0), LANES), [a, lanes])
                    with T.serial(0, part // LINE) as line:
                        for stream in range(streams):
                            at = vs * (streams * part // 4) + stream * (part // 4) + line * LANES
                            if level:
                                ahead = T.address_of(data[T.min(at + PREFETCH_BYTES // 4, nbytes // 4 - 1)])
                                hint = (ahead, T.int32(0), T.int32(4 - level), T.int32(1))  # read, locality, data
                                T.evaluate(T.call_llvm_intrin("", "llvm.prefetch.p0", *hint))
                            chain = stream % 4
                            value = T.bitwise_xor(acc[chain, lanes], data[T.ramp(at, 1, LANES)])
                            T.buffer_store(acc, value, [chain, lanes])
                    total = acc[0, lanes]
                    for a in range(1, 4):
                        total = T.bitwise_xor(total, acc[a, lanes])
                    T.buffer_store(out, total, [vs, lanes])
    return builder.get()
