"""Integer linear layers for NEON without dot products (Cortex-A72, A53): bytes multiplied into 16-bit sums.

The operators and the arithmetic are those of schedules.linear_int8, which see; integers are exact and fp32 operations
come in the same order. What a tile computes is in schedules.widening_tile.

No int16 sum overflows: |activation| <= 127, so MOST products of one size fit before SADALP moves them to int32,
MOST = 32767 // (127 * largest |code|):
    bits 2: 86    3: 36    4: 17    5: 8    6: 4    8: 2 (codes minus 128: 2 * 128 * 127 = 32512)    levels: 2 (32258)
A lane gets one product for 8 inputs, at most 16 in a span of 128: 4-bit codes need no SADALP. An int32 holds
128 * 255 * 127 and twice that with the zero point. -128 never occurs among activations.

Cortex-A72: one multiplication of 8 bytes a cycle and no more, so 0.125 cycles a product is the floor; the rest must fit
beside it. Tiles of four rows and up to four tokens share a row's unpacked codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules.counted import marks
from schedules.geometry import Geometry
from schedules.kernel import Kernel, NotSuited, Request, Space
from schedules.linear_int8 import CODES, SCALE, int8_levels, tuned_alike
from schedules.packed import affine_of, factors_of, name_tail
from schedules.packed_rows import BYTES, ROWS, blocks, storage_of, weight_packings
from schedules.packed_rows import steps as steps_of
from schedules.widening_tile import UNROLLED, Layer, Tile

RANK = 5  # below AMX, which never meets it
# With TBL, whose latency is twice as long, a longer body pays (NF4, groups of 64: 0.254 cycles a product, not 0.275).
UNROLLED_LOOKUP = 128


def kernel(layer: Layer, name: str) -> Any:
    """Blocks of four rows in parallel, then tiles of tokens."""
    m, n, geometry, storage = layer.m, layer.n, layer.geometry, layer.storage
    spans, width = geometry.spans, geometry.width
    groups = (blocks(n), spans, ROWS)
    shapes = {
        "q": ((m, spans, width), "int8"),
        "ascale": ((m, spans), "float32"),
        "asum": ((m, spans), "int32"),
        "codes": ((blocks(n), steps_of(geometry, storage), storage.vectors, ROWS, BYTES), "uint8"),
        "scale": (groups, layer.scale_dtype),
    }
    if "zero" in layer.affine:
        shapes["zero"] = (groups if layer.affine == "zero" else (1,), "int8" if storage.bits == 8 else "uint8")
    elif layer.affine == "offset":
        shapes["offset"] = (groups, "float32")
    if layer.residual:
        shapes["residual"] = ((m, n), "float32")
    shapes["out"] = ((m, n), "float32")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        buffers = {key: T.arg(key, T.buffer(shape, dtype, layout=None)) for key, (shape, dtype) in shapes.items()}
        with T.sblock("linear"):
            T.reads(*(_whole(b, shapes[key][0]) for key, b in buffers.items() if key != "out"))
            T.writes(_whole(buffers["out"], (m, n)))
            with T.parallel(blocks(n)) as block:
                if m == layer.tokens == 1:
                    Tile(layer, buffers, block, T.int32(0)).emit()
                else:
                    with T.serial(m // layer.tokens, annotations=marks(layer.tokens) if m > 1 else None) as tile:
                        Tile(layer, buffers, block, tile * layer.tokens).emit()
    return builder.get()


def _whole(buffer: Any, shape: tuple[int, ...]) -> Any:
    return buffer[tuple(slice(0, extent) for extent in shape)]


def lower(request: Request) -> Kernel:
    """For aarch64 with NEON and without dot products; other targets are not suited."""
    _require(request)
    group, affine = int(request.attrs["group"]), factors_of(request, SCALE)
    m, (n, k) = request.args[0].shape[0], request.args[CODES].shape
    geometry, storage = Geometry(k, group), storage_of(int(request.attrs["bits"]))
    table, unit = int8_levels(request.table) if request.table is not None else (None, 1.0)
    residual = request.op.endswith("_residual")
    scale_dtype = request.args[SCALE].dtype
    layer = Layer(m, n, geometry, storage, scale_dtype, affine, residual, table, unit)
    knobs = default_knobs(layer) | dict(request.knobs)
    layer = replace(
        layer, tokens=knobs["tokens"], unroll=knobs["unroll"], prefetch_bytes=knobs["prefetch_bytes"]
    )  # fmt: skip
    kind = request.attrs.get("grid", storage.name)
    tail = name_tail(affine, residual)
    name = f"linear_{kind}a8_widening_m{m}_n{n}_k{k}_g{group}_s{scale_dtype[5:]}{tail}"
    return Kernel(name, kernel(layer, name), weight_packings(CODES, n, geometry, storage, scale_dtype, affine))


def _require(request: Request) -> None:
    """Raise NotSuited for another target."""
    target = request.target
    if target.arch != "aarch64" or not target.has("neon") or target.has("dotprod"):
        raise NotSuited


def default_knobs(layer: Layer) -> dict[str, int]:
    """By count of instructions and llvm-mca's cycles; no board has been asked yet."""
    tile = 4 if layer.most > 2 else 2  # where every other product moves on to int32, sixteen such sums would spill
    tokens = next(t for t in (tile, 2, 1) if layer.m % t == 0)
    unroll = UNROLLED if layer.table is None else UNROLLED_LOOKUP
    return {"tokens": tokens, "unroll": unroll, "prefetch_bytes": 0}


def space(request: Request) -> Space:
    """What tuning may try."""
    _require(request)
    group, affine = int(request.attrs["group"]), affine_of(request.op)
    m, (n, k) = request.args[0].shape[0], request.args[CODES].shape
    bits = int(request.attrs["bits"])
    table = int8_levels(request.table)[0] if request.table is not None else None
    layer = Layer(m, n, Geometry(k, group), storage_of(bits), "float16", affine, False, table, 1.0)
    default = default_knobs(layer)
    bodies = {replace(layer, unroll=unroll).body: unroll for unroll in (default["unroll"], 32, 64, 128, 256)}
    bodies[replace(layer, unroll=default["unroll"]).body] = default["unroll"]  # others make the same loop
    tried = {
        "tokens": tuple(t for t in (1, 2, 4) if m % t == 0),
        "unroll": tuple(bodies.values()),
        "prefetch_bytes": (0, 256, 512, 1024, 2048) if m == 1 else (0, 512),
    }
    name = "linear_int8_widening.neon"
    return Space.around(default, tried, schedule=name, workload=tuned_alike(request), macs=m * n * k)


LOWERS = {
    f"quern.linear_int8{affine}{tail}": lower for affine in ("", "_offset", "_table") for tail in ("", "_residual")
}
SPACES = dict.fromkeys(LOWERS, space)
