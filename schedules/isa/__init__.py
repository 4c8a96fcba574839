"""Integer dot products per instruction set: one file each, found by walking this folder.

All files implement the same description (`describe`), so one template serves every instruction set. A file states
`NAME`, `NEEDS` (LLVM feature names), `RANK` (higher wins), `KNOBS` (its measured defaults; perhaps
`packed_prefetch_bytes` for codes below 8 bits and a small first-level cache), `VECTOR` (32-bit lanes of
one register), `TABLE_ZERO` and `step`, the few instructions that are really its own.
"""

from __future__ import annotations

import importlib
import pkgutil
import zlib
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from schedules import storage as storages
from schedules.storage import LANES, QUAD, Storage, Table

if TYPE_CHECKING:
    from targets import Target


class Isa(Protocol):
    """What a file in this folder offers.

    step(storage, table, acc, w, a) -> acc + dot: acc i32 vector [VECTOR]; w: storage.vectors u8 vectors [4 * VECTOR];
    a: storage.quads i32 scalars of 4 int8 activations each. With a table, codes stand for their level in it, which
    already includes TABLE_ZERO: 128 where the instructions want unsigned levels, 0 where they take signed ones.
    """

    NAME: str
    NEEDS: tuple[str, ...]
    RANK: int
    KNOBS: dict[str, int]
    VECTOR: int
    TABLE_ZERO: int

    @staticmethod
    def step(storage: Storage, table: Table | None, acc: Any, w: Sequence[Any], a: Sequence[Any]) -> Any:
        """The dot product, as said above."""


class ByQuads(Isa, Protocol):
    """What more a file offers whose prompts go through schedules.linear_int8_unpacked.

    KNOBS: unpacked_tokens of a tile; unpacked_few: so many tiles leave no codes behind; unpacked_asks: times that such
    a tile asks memory for a line, since not every wish is granted; unpacked_quads of a loop body; unpacked_span, stored
    inputs below which a span is mostly scaling. PARTIAL: elements of a register of sums.
    BYTE_PLANES: passes that codes of 8 bits are multiplied in: 1, or 2 of 4 bits each.
    levels(table, codes) -> u8[4 * VECTOR], where TABLE_ZERO makes them unsigned.
    multiply(sums, codes u8[4 * VECTOR], quad i8[4 * VECTOR]) -> the sums with these products.
    Where PARTIAL is not int32, held(bits) -> products of how many quads a sum holds, a power of two, and
    gather(sums, plane) -> i32[VECTOR], what they add up to for each row.
    """

    PARTIAL: str
    BYTE_PLANES: int

    @staticmethod
    def held(bits: int) -> int:
        """As said above."""

    @staticmethod
    def levels(table: Table, codes: Any) -> Any:
        """As said above."""

    @staticmethod
    def multiply(partial: Any, codes: Any, quad: Any) -> Any:
        """As said above."""

    @staticmethod
    def gather(partial: Any, plane: int) -> Any:
        """As said above."""


def choose(target: Target) -> Isa:
    """The best instruction set whose features the target has. `generic` needs none, so there is always one."""
    found = [cast(Isa, importlib.import_module(f"{__name__}.{m.name}")) for m in pkgutil.iter_modules(__path__)]
    return max((isa for isa in found if all(target.has(f) for f in isa.NEEDS)), key=lambda isa: isa.RANK)


def broadcast_quad(a: Any, lanes: int) -> Any:
    """i32 scalar holding 4 int8 -> int8 vector of the same 4 repeated `lanes` times."""
    return T.reinterpret(f"int8x{QUAD * lanes}", T.broadcast(a, lanes))


def broadcast_table(table: Table, lanes: int) -> Any:
    """16 levels repeated over an int8 vector [4 * lanes]: what a byte shuffle looks codes up in."""
    words = [int.from_bytes(bytes(v & 255 for v in table[i : i + 4]), "little", signed=True) for i in range(0, 16, 4)]
    values = [T.int32(words[i % 4]) for i in range(lanes)]
    return T.reinterpret(f"int8x{QUAD * lanes}", tirx.Shuffle(values, list(range(lanes))))


def describe(storage: Storage, table: Table | None) -> Any:
    """C i32[16] += level(W u8[vectors, 16, 4]) . A i8[inputs]: a step as schedules.storage has it."""
    return _describe_byte() if storage.quads == 1 else _describe(storage, table)


@cache
def _describe_byte() -> Any:
    @T.prim_func(s_tir=True)
    def whole(a: T.handle, w: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (QUAD,), "int8", offset_factor=4)
        W = T.match_buffer(w, (1, LANES, QUAD), "uint8", offset_factor=64)
        C = T.match_buffer(c, (LANES,), "int32", offset_factor=16)
        with T.sblock("root"):
            T.reads(C[0:LANES], W[0, 0:LANES, 0:QUAD], A[0:QUAD])
            T.writes(C[0:LANES])
            for i, b in T.grid(LANES, QUAD):
                with T.sblock("dot"):
                    vi, vb = T.axis.remap("SR", [i, b])
                    C[vi] = C[vi] + T.Cast("int32", W[0, vi, vb]) * T.Cast("int32", A[vb])

    return whole


@cache
def _describe(storage: Storage, table: Table | None) -> Any:
    inputs, vectors = storage.inputs, storage.vectors

    def value(W: Any, f: Any, i: Any, b: Any) -> Any:
        return storages.level(table, storages.code(storage, f, lambda v: W[v, i, b]))

    @T.prim_func(s_tir=True)
    def split(a: T.handle, w: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (inputs,), "int8", offset_factor=4)
        W = T.match_buffer(w, (vectors, LANES, QUAD), "uint8", offset_factor=64)
        C = T.match_buffer(c, (LANES,), "int32", offset_factor=16)
        with T.sblock("root"):
            T.reads(C[0:LANES], W[0:vectors, 0:LANES, 0:QUAD], A[0:inputs])
            T.writes(C[0:LANES])
            for f, i, b in T.grid(storage.quads, LANES, QUAD):
                with T.sblock("dot"):
                    vf, vi, vb = T.axis.remap("RSR", [f, i, b])
                    C[vi] = C[vi] + value(W, vf, vi, vb) * T.Cast("int32", A[vf * QUAD + vb])

    return split


def _implement(isa: Isa, storage: Storage, table: Table | None, prefetch_bytes: int, prefetch_level: int) -> Any:
    """The description in this ISA's instructions; prefetch_bytes > 0 asks for weights that far ahead, into a cache."""
    inputs, vectors, quads, vector = storage.inputs, storage.vectors, storage.quads, isa.VECTOR
    acc_type, w_type = f"int32x{vector}", f"uint8x{QUAD * vector}"

    def part(index: Any, C: Any, W: Any, A: Any) -> Any:
        w = [W.vload([v, index * vector, 0], w_type) for v in range(vectors)]
        a = [T.reinterpret("int32", A.vload([f * QUAD], "int8x4")) for f in range(quads)]
        return isa.step(storage, table, C.vload([index * vector], acc_type), w, a)

    def prefetch(W: Any, v: Any) -> Any:
        element = W.elem_offset + (v * LANES * QUAD + prefetch_bytes)
        ahead = T.tvm_access_ptr(T.type_annotation("uint8"), W.data, element, 64, 1)
        locality = T.int32(4 - prefetch_level)  # LLVM: 3 = keep in all levels, 2 = from the second on
        return T.call_llvm_intrin("", "llvm.prefetch.p0", ahead, T.int32(0), locality, T.int32(1))  # read, data

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, w: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (inputs,), "int8", offset_factor=4)
        W = T.match_buffer(w, (vectors, LANES, QUAD), "uint8", offset_factor=64)
        C = T.match_buffer(c, (LANES,), "int32", offset_factor=16)
        with T.sblock("root"):
            T.reads(C[0:LANES], W[0:vectors, 0:LANES, 0:QUAD], A[0:inputs])
            T.writes(C[0:LANES])
            if prefetch_bytes > 0:
                for v in T.unroll(vectors):
                    T.evaluate(prefetch(W, v))
            for i in T.unroll(LANES // vector):
                C[T.ramp(i * vector, 1, vector)] = part(i, C, W, A)

    return implementation


@cache
def register(
    name: str, storage: Storage, table: Table | None, prefetch_bytes: int, prefetch_level: int = 1
) -> str:
    """Name under which TVM's `tensorize` finds the implementation of the instruction set called `name`."""
    isa = cast(Isa, importlib.import_module(f"{__name__}.{name}"))
    looked_up = "" if table is None else f"_t{zlib.crc32(bytes(v & 255 for v in table)):08x}"
    intrinsic = f"quern_dot_{storage.name}{looked_up}_{name}_pf{prefetch_bytes}_l{prefetch_level}"
    made = _implement(isa, storage, table, prefetch_bytes, prefetch_level)
    TensorIntrin.register(intrinsic, describe(storage, table), made, override=True)
    return intrinsic
