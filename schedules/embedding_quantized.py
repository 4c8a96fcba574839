"""Rows of an embedding table that stays in its codes: a row is made fp32 when a token asks for it.

  quern.embedding_quantized         ids i32[m], codes u8[vocab, d], scale f16|f32[vocab, groups],
                                    zero i16[vocab, groups]; bits, group, times -> f32[m, d]
  quern.embedding_quantized_offset  offset f32[vocab, groups] instead of zero
  quern.embedding_quantized_table   neither; grid, bits, group, times; the request's table has the values of the codes

    out = (scale * (value of the code - zero) + offset) * times, one fp32 rounding an operation at most
Layout of a row: its low plane, then its high plane (schedules.storage). A byte's fields are d / (fields a byte) inputs
apart, so that neighbours in memory are neighbours in the row.
ids must lie in 0..vocab-1: the runtime checks them, the kernel does not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import storage as storages
from schedules import vector
from schedules.kernel import Kernel, Packing, Request, TensorSpec, spelled
from schedules.packed import affine_of
from schedules.storage import QUAD, Storage
from schedules.vector import Expr


def row_bytes(d: int, storage: Storage) -> int:
    """Bytes of a row."""
    return d * storage.bits // 8


def _pack(codes: np.ndarray, *, storage: Storage) -> np.ndarray:
    """codes u8[vocab, d] -> u8[vocab, row_bytes]."""
    planes = [_plane(codes & np.uint8((1 << storage.low) - 1), storage.low)]
    if storage.high:
        planes.append(_plane(codes >> np.uint8(storage.low), storage.high))
    return np.ascontiguousarray(np.concatenate(planes, axis=1))


def _pack_zeros(zero: np.ndarray, *, groups: tuple[int, ...]) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(zero, groups), np.uint8)


def _plane(values: np.ndarray, bits: int) -> np.ndarray:
    fields = values.reshape(values.shape[0], 8 // bits, -1)
    byte = fields[:, 0]
    for f in range(1, 8 // bits):
        byte = byte | (fields[:, f] << np.uint8(bits * f))
    return byte


def packings(request: Request, storage: Storage) -> dict[int, Packing]:
    """Codes share bytes; a zero takes one, and stands at every group also where there is one in all, i16[1, 1]."""
    (vocab, d), affine = request.args[1].shape, affine_of(request.op)
    spec = TensorSpec((vocab, row_bytes(d, storage)), "uint8")
    found = {1: Packing(f"rows_{storage.name}", spec, partial(_pack, storage=storage), rows=1)}
    if affine == "zero":
        groups = request.args[2].shape
        found[3] = Packing("rows_zero", TensorSpec(groups, "uint8"), partial(_pack_zeros, groups=groups))
    return found


def lower(request: Request) -> Kernel:
    """One loop a token and field; tokens in parallel."""
    (m,), (vocab, d), scales = request.args[0].shape, request.args[1].shape, request.args[2]
    attrs, affine = request.attrs, affine_of(request.op)
    group, times = int(attrs["group"]), float(attrs["times"])
    storage = storages.choose(int(attrs["bits"]), d * QUAD)  # whole bytes are all that a row needs
    kind = f"{attrs.get('grid', storage.name)}_g{group}_s{scales.dtype[5:]}" + ("_offset" if affine == "offset" else "")
    name = f"embedding_{kind}_m{m}_v{vocab}_d{d}" + (f"_x{spelled(times)}" if times != 1 else "")
    size, per = row_bytes(d, storage), storage.per_vector
    part = d // storage.quads  # inputs between two fields of the narrower plane
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        id_of = T.arg("ids", T.buffer((m,), "int32", layout=None))
        codes = T.arg("codes", T.buffer((vocab, size), "uint8", layout=None))
        scale = T.arg("scale", T.buffer(scales.shape, scales.dtype, layout=None))
        more: list[Any] = []
        if affine != "table":
            dtype = "uint8" if affine == "zero" else "float32"
            more.append(T.arg(affine, T.buffer(scales.shape, dtype, layout=None)))
        out = T.arg("out", T.buffer((m, d), "float32", layout=None))
        with T.sblock("embedding"):
            T.reads(id_of[0:m], *(b[tuple(slice(0, int(n)) for n in b.shape)] for b in (codes, scale, *more)))
            T.writes(out[0:m, 0:d])
            with vector.tokens(m) as t:
                row = T.bind(id_of[t])

                def widen(segment: int, offset: Expr, lanes: int) -> None:
                    """Inputs offset..offset+lanes-1 of a segment, whose fields have one place in each plane."""
                    low = segment % (storage.quads // per) * part
                    shift = segment * per // storage.quads * storage.low
                    code = _bits(codes[row, vector.at(low + offset, lanes)], shift, storage.low, lanes)
                    if storage.high:
                        byte = codes[row, vector.at(d * storage.low // 8 + offset, lanes)]
                        high = _bits(byte, segment * storage.high, storage.high, lanes)
                        code = T.bitwise_or(code, T.shift_left(high, vector.splat(T.int32(storage.low), lanes)))
                    place = vector.at(segment * part + offset, lanes)
                    groups = T.floordiv(place, vector.splat(T.int32(group), lanes))
                    factor = T.Cast(vector.kind("float32", lanes), scale[row, groups])
                    if request.table is not None:
                        value = vector.look_up(request.table, code, lanes) * factor
                    elif affine == "zero":
                        code = code - T.Cast(vector.kind("int32", lanes), more[0][row, groups])
                        value = T.Cast(vector.kind("float32", lanes), code) * factor
                    else:
                        value = T.Cast(vector.kind("float32", lanes), code) * factor + more[0][row, groups]
                    if times != 1:
                        value = value * vector.splat(times, lanes)
                    vector.store(out, value, t, segment * part + offset, lanes=lanes)

                for segment in range(storage.quads):
                    vector.sweep(part, partial(widen, segment))
    return Kernel(name, builder.get(), packings(request, storage))


def _bits(byte: Expr, shift: int, bits: int, lanes: int) -> Expr:
    """A field of every byte, as int32."""
    wide = T.Cast(vector.kind("int32", lanes), byte)
    shifted = T.shift_right(wide, vector.splat(T.int32(shift), lanes))
    return T.bitwise_and(shifted, vector.splat(T.int32((1 << bits) - 1), lanes))


LOWERS = {f"quern.embedding_quantized{affine}": lower for affine in ("", "_offset", "_table")}
