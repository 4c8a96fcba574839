"""Integer dot products per instruction set: one file each, found by walking this folder.

All files implement the same description (`describe`), so one template serves every instruction set. A file states
`NAME`, `NEEDS` (LLVM feature names), `RANK` (higher wins), `KNOBS` (its measured defaults), `VECTOR` (32-bit lanes of
one register) and `step`, the few instructions that are really its own.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

if TYPE_CHECKING:
    from targets import Target

LANES = 16  # output features a dot product works on at once
QUAD = 4  # consecutive inputs that lie side by side in one 32-bit lane


class Isa(Protocol):
    """What a file in this folder offers.

    step(bits, acc, w, a) -> acc + dot: acc i32 vector [VECTOR]; w u8 vector [4 * VECTOR], 4 consecutive stored bytes a
    lane; a: one i32 scalar per field of a byte (low bits first), the 4 int8 activations that meet that field.
    """

    NAME: str
    NEEDS: tuple[str, ...]
    RANK: int
    KNOBS: dict[str, int]
    VECTOR: int

    @staticmethod
    def step(bits: int, acc: Any, w: Any, a: Sequence[Any]) -> Any:
        """The dot product, as said above."""


def choose(target: Target) -> Isa:
    """The best instruction set whose features the target has. `generic` needs none, so there is always one."""
    found = [cast(Isa, importlib.import_module(f"{__name__}.{m.name}")) for m in pkgutil.iter_modules(__path__)]
    return max((isa for isa in found if all(target.has(f) for f in isa.NEEDS)), key=lambda isa: isa.RANK)


def fields(bits: int) -> int:
    """Codes per stored byte."""
    return 8 // bits


def broadcast_quad(a: Any, lanes: int) -> Any:
    """i32 scalar holding 4 int8 -> int8 vector of the same 4 repeated `lanes` times."""
    return T.reinterpret(f"int8x{QUAD * lanes}", T.broadcast(a, lanes))


def field(w: Any, bits: int, index: int, lanes: int) -> Any:
    """Codes of one field of every byte in u8 vector w[4 * lanes]; the top field needs no mask."""
    width = QUAD * lanes
    shifted = w if index == 0 else T.shift_right(w, T.broadcast(T.uint8(bits * index), width))
    last = index == fields(bits) - 1
    return shifted if last else T.bitwise_and(shifted, T.broadcast(T.uint8((1 << bits) - 1), width))


@cache
def describe(bits: int) -> Any:
    """C i32[16] += W u8[16, 4] . A i8[fields, 4]: field h of a byte, low bits first, meets row h (8 bits: A i8[4])."""
    count = fields(bits)
    mask = (1 << bits) - 1

    @T.prim_func(s_tir=True)
    def whole(a: T.handle, w: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (QUAD,), "int8", offset_factor=4)
        W = T.match_buffer(w, (LANES, QUAD), "uint8", offset_factor=64)
        C = T.match_buffer(c, (LANES,), "int32", offset_factor=16)
        with T.sblock("root"):
            T.reads(C[0:LANES], W[0:LANES, 0:QUAD], A[0:QUAD])
            T.writes(C[0:LANES])
            for i, b in T.grid(LANES, QUAD):
                with T.sblock("dot"):
                    vi, vb = T.axis.remap("SR", [i, b])
                    C[vi] = C[vi] + T.Cast("int32", W[vi, vb]) * T.Cast("int32", A[vb])

    @T.prim_func(s_tir=True)
    def split(a: T.handle, w: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (count, QUAD), "int8", offset_factor=4, strides=[T.int32(), 1])
        W = T.match_buffer(w, (LANES, QUAD), "uint8", offset_factor=64)
        C = T.match_buffer(c, (LANES,), "int32", offset_factor=16)
        with T.sblock("root"):
            T.reads(C[0:LANES], W[0:LANES, 0:QUAD], A[0:count, 0:QUAD])
            T.writes(C[0:LANES])
            for h, i, b in T.grid(count, LANES, QUAD):
                with T.sblock("dot"):
                    vh, vi, vb = T.axis.remap("RSR", [h, i, b])
                    C[vi] = C[vi] + T.Cast(
                        "int32", T.bitwise_and(T.shift_right(W[vi, vb], T.Cast("uint8", vh * bits)), T.uint8(mask))
                    ) * T.Cast("int32", A[vh, vb])

    return whole if count == 1 else split


def _implement(isa: Isa, bits: int, prefetch_bytes: int, prefetch_level: int) -> Any:
    """The description in this ISA's instructions; prefetch_bytes > 0 asks for weights that far ahead, into a cache."""
    count = fields(bits)
    vector = isa.VECTOR
    acc_type, w_type = f"int32x{vector}", f"uint8x{QUAD * vector}"

    def half(index: Any, C: Any, W: Any, quads: Sequence[Any]) -> Any:
        acc, w = C.vload([index * vector], acc_type), W.vload([index * vector, 0], w_type)
        return isa.step(bits, acc, w, [T.reinterpret("int32", quad) for quad in quads])

    def prefetch(W: Any) -> Any:
        ahead = T.tvm_access_ptr(T.type_annotation("uint8"), W.data, W.elem_offset + prefetch_bytes, 64, 1)
        locality = T.int32(4 - prefetch_level)  # LLVM: 3 = keep in all levels, 2 = from the second on
        return T.call_llvm_intrin("", "llvm.prefetch.p0", ahead, T.int32(0), locality, T.int32(1))  # read, data

    if count == 1:

        @T.prim_func(s_tir=True)
        def whole(a: T.handle, w: T.handle, c: T.handle) -> None:
            A = T.match_buffer(a, (QUAD,), "int8", offset_factor=4)
            W = T.match_buffer(w, (LANES, QUAD), "uint8", offset_factor=64)
            C = T.match_buffer(c, (LANES,), "int32", offset_factor=16)
            with T.sblock("root"):
                T.reads(C[0:LANES], W[0:LANES, 0:QUAD], A[0:QUAD])
                T.writes(C[0:LANES])
                if prefetch_bytes > 0:
                    T.evaluate(prefetch(W))
                for i in T.unroll(LANES // vector):
                    C[T.ramp(i * vector, 1, vector)] = half(i, C, W, [A.vload([0], "int8x4")])

        return whole

    @T.prim_func(s_tir=True)
    def split(a: T.handle, w: T.handle, c: T.handle) -> None:
        stride = T.int32()
        A = T.match_buffer(a, (count, QUAD), "int8", offset_factor=4, strides=[stride, 1])
        W = T.match_buffer(w, (LANES, QUAD), "uint8", offset_factor=64)
        C = T.match_buffer(c, (LANES,), "int32", offset_factor=16)
        with T.sblock("root"):
            T.reads(C[0:LANES], W[0:LANES, 0:QUAD], A[0:count, 0:QUAD])
            T.writes(C[0:LANES])
            if prefetch_bytes > 0:
                T.evaluate(prefetch(W))
            for i in T.unroll(LANES // vector):
                C[T.ramp(i * vector, 1, vector)] = half(i, C, W, [A.vload([h, 0], "int8x4") for h in range(count)])

    return split


@cache
def register(name: str, bits: int, prefetch_bytes: int, prefetch_level: int = 1) -> str:
    """Name under which TVM's `tensorize` finds the implementation of the instruction set called `name`."""
    isa = cast(Isa, importlib.import_module(f"{__name__}.{name}"))
    intrinsic = f"quern_dot_w{bits}_{name}_pf{prefetch_bytes}_l{prefetch_level}"
    TensorIntrin.register(
        intrinsic, describe(bits), _implement(isa, bits, prefetch_bytes, prefetch_level), override=True
    )
    return intrinsic
