"""Integer linear layers: packed 2- to 8-bit weights, int8 activations, one fp32 scale per (row, span).

    out[m, n] = (residual[m, n] +) sum over spans s of
                ascale[m, s] * scale[n, s] * (sum_i code[n, s, i] * q[m, s, i] - zero[n, s] * asum[m, s])
                (+ offset[n, s] * asum[m, s] * ascale[m, s])

The zero point meets the span's activation sum, so the inner loop sees unsigned codes only. On a table grid a code
stands for its int8 level, round(127 * value / largest value), and the scale for 127ths of it. One workload in plain
TIR, one template; the instruction set is a `tensorize` away (schedules.isa). Layout: schedules.packed.
Operators (arguments in order), each also as *_residual with residual f32[m, n] at the end:
  quern.linear_int8         q i8[m, spans, width], ascale f32[m, spans], asum i32[m, spans],
                            codes u8[n, k], scale f16|f32[n, groups], zero i16[n, groups], or i16[1, 1] where all
                            are equal; bits, group -> f32[m, n]
  quern.linear_int8_offset  offset f32[n, groups] instead of zero
  quern.linear_int8_table   neither; grid, bits, group; the request's table has the values of the codes
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from tvm import s_tir
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import isa as isas
from schedules import storage as storages
from schedules.balance import balanced
from schedules.counted import marks
from schedules.geometry import Geometry
from schedules.kernel import Kernel, Request, Space
from schedules.packed import affine_of, blocks, factors_of, interleave, name_tail, weight_packings
from schedules.storage import LANES, QUAD, Storage, Table

CODES, SCALE = 3, 4  # argument positions of the weight; its zero or offset is next
LEVEL_MAX = 127
ROOMY_L1D_KIB = 48
# Codes of a layer that one thread computes sooner than others are called and waited for (1.2 us on Zen 4): 98 KB from
# the cache take 1.9 us by one thread and 2.4 by two.
ALONE_BYTES = 1 << 17
MOST_ACCUMULATORS = 32  # row blocks x tokens: beyond the vector registers of any instruction set here


def int8_levels(values: tuple[float, ...]) -> tuple[Table, float]:
    """(level of every code, value of one level): what integer kernels take for a table grid, half to even."""
    table = np.array(values, np.float32)
    largest = np.abs(table).max()
    levels = np.rint(table.astype(np.float64) * (LEVEL_MAX / float(largest)))
    return tuple(int(v) for v in levels), float(largest / np.float32(LEVEL_MAX))


def workload(
    m: int,
    n: int,
    geometry: Geometry,
    storage: Storage,
    scale_dtype: str,
    residual: bool,
    affine: str = "zero",
    levels: tuple[Table, float, int] | None = None,
    x: int = 1,
) -> Any:
    """The layer in plain TIR: blocks `dot` (int32 per span), `scale` (fp32 over spans), `store` (residual, padding).

    affine: "zero", "one_zero", "offset" or "table". levels: the instruction set's table, value of one level, level of
    zero. x: blocks that lie beside each other.
    """
    nb, spans, width, quads = blocks(n), geometry.spans, geometry.width, storage.quads
    steps, inputs, by_span = width // storage.inputs, storage.inputs, (nb // x, spans, x, LANES)
    table, unit, middle = levels or (None, 1.0, 0)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
            q = T.arg("q", T.buffer((m, spans, width), "int8"))
            ascale = T.arg("ascale", T.buffer((m, spans), "float32"))
            asum = T.arg("asum", T.buffer((m, spans), "int32"))
            codes = T.arg("codes", T.buffer((nb // x, spans, steps, x, storage.vectors, LANES, QUAD), "uint8"))
            scale = T.arg("scale", T.buffer(by_span, scale_dtype))
            zero_shape = {"zero": by_span, "one_zero": (1,)}.get(affine)
            zero = T.arg("zero", T.buffer(zero_shape, "uint8")) if zero_shape else None
            offset = T.arg("offset", T.buffer(by_span, "float32")) if affine == "offset" else None
            base = T.arg("residual", T.buffer((m, n), "float32")) if residual else None
            out = T.arg("out", T.buffer((m, n), "float32"))
            with T.sblock("root"):
                total = T.sblock_alloc_buffer((m, nb, spans, LANES), "int32")
                acc = T.sblock_alloc_buffer((m, nb, LANES), "float32")
                by_quad = (quads,) if quads > 1 else ()
                with T.grid(m, nb, spans, steps, *by_quad, LANES, QUAD) as (im, ib, s, j, *f, i, b):
                    with T.sblock("dot"):
                        kinds = "SSSR" + "R" * len(f) + "SR"
                        vm, vb, vs, vj, *vf, vi, vq = T.axis.remap(kinds, [im, ib, s, j, *f, i, b])
                        with T.init():
                            T.buffer_store(total, T.int32(0), [vm, vb, vs, vi])
                        quad = vf[0] if vf else 0
                        code = storages.code(storage, quad, lambda v: codes[vb // x, vs, vj, vb % x, v, vi, vq])
                        activation = T.Cast("int32", q[vm, vs, vj * inputs + quad * QUAD + vq])
                        product = storages.level(table, code) * activation
                        T.buffer_store(total, total[vm, vb, vs, vi] + product, [vm, vb, vs, vi])
                with T.grid(m, nb, spans, LANES) as (im, ib, s, i):
                    with T.sblock("scale"):
                        vm, vb, vs, vi = T.axis.remap("SSRS", [im, ib, s, i])
                        with T.init():
                            T.buffer_store(acc, T.float32(0), [vm, vb, vi])
                        centred, place = total[vm, vb, vs, vi], (vb // x, vs, vb % x, vi)
                        if zero is not None:
                            row_zero = zero[place if affine == "zero" else (0,)]
                            centred = centred - T.Cast("int32", row_zero) * asum[vm, vs]
                        elif middle:
                            centred = centred - T.int32(middle) * asum[vm, vs]
                        by_token = ascale[vm, vs] if table is None else ascale[vm, vs] * T.float32(unit)
                        factor = T.Cast("float32", scale[place]) * by_token
                        value = T.Cast("float32", centred) * factor
                        if offset is not None:
                            value = value + offset[place] * (T.Cast("float32", asum[vm, vs]) * ascale[vm, vs])
                        T.buffer_store(acc, acc[vm, vb, vi] + value, [vm, vb, vi])
                with T.grid(m, nb, LANES) as (im, ib, i):
                    with T.sblock("store"):
                        vm, vb, vi = T.axis.remap("SSS", [im, ib, i])
                        row = vb * LANES + vi
                        value = acc[vm, vb, vi] if base is None else base[vm, row] + acc[vm, vb, vi]
                        if nb * LANES == n:
                            T.buffer_store(out, value, [vm, row])
                        else:  # inside the block: `T.where` is lost by reverse_compute_at
                            with T.If(row < n), T.Then():
                                T.buffer_store(out, value, [vm, row])
    return builder.get()


def _largest_divisor(of: int, most: int) -> int:
    return next(d for d in range(min(of, most), 0, -1) if of % d == 0)


def default_knobs(
    m: int, n: int, geometry: Geometry, storage: Storage, isa: isas.Isa, l1d_kib: int | None
) -> dict[str, int]:
    """The template's stated default for a shape: the ISA's measured choice, cut down to what divides the shape.

    One token: exactly the row blocks that lie beside each other, so that a task reads one stream. Prefetching it into
    the second-level cache, where an instruction set asks for that, was better than into 32 KiB of the first (Zen 4: 34
    against 25 GB/s); with 48 KiB (Sapphire Rapids) the first level was the better place. Many tokens: a tile takes one
    block of those beside each other, which no hardware prefetcher follows; with few real rows the weights' way from
    memory is what a call waits for.
    """
    steps = geometry.width // storage.inputs
    x = interleave(n, isa.KNOBS["row_blocks"])
    roomy, ahead = (l1d_kib or 0) >= ROOMY_L1D_KIB, isa.KNOBS["prefetch_bytes"]
    if storage.low < 8 and not roomy:
        ahead = isa.KNOBS.get("packed_prefetch_bytes", ahead)
    gemm = "gemm_" if m > 1 else ""
    return {
        "row_blocks": _largest_divisor(x, isa.KNOBS["gemm_row_blocks"]) if m > 1 else x,
        "tokens": _largest_divisor(m, isa.KNOBS["gemm_tokens"]) if m > 1 else 1,
        "unroll": _largest_divisor(steps, isa.KNOBS[f"{gemm}unroll"]),
        "prefetch_bytes": ahead if m == 1 else isa.KNOBS["gemm_prefetch_bytes"],
        "prefetch_level": 1 if m == 1 and roomy else 2,
    }


def template(
    sch: Any, intrinsic: str, knobs: Mapping[str, Any], aligned: bool, many: bool, parallel: bool = True
) -> None:
    """Rows (in parallel), then tokens, then spans; row_blocks x tokens accumulators stay in registers over a span.

    aligned: the rows fill their blocks. many: for more than one token.

    `knobs` may hold integers or sampled random variables of a MetaSchedule trace; the trace has the same steps for all.
    """
    dot, scale, store = (sch.get_sblock(name) for name in ("dot", "scale", "store"))
    im, ib, s, i = sch.get_loops(scale)
    ibo, ibi = sch.split(ib, [None, knobs["row_blocks"]])
    imo, imi = sch.split(im, [None, knobs["tokens"]])
    sch.reorder(ibo, imo, s, ibi, imi, i)
    if parallel:
        sch.parallel(ibo)
    if many:
        for key, value in marks(knobs["tokens"]).items():
            sch.annotate(imo, key, value)

    sch.compute_at(dot, s, preserve_unit_loops=True)
    _, _, _, dm, db, ds, j, *inner = sch.get_loops(dot)
    jo, ji = sch.split(j, [None, knobs["unroll"]])
    sch.reorder(ds, jo, ji, db, dm, *inner)
    for loop in (ji, db, dm):
        sch.unroll(loop)
    init = sch.decompose_reduction(dot, jo)
    sch.tensorize(inner[0], intrinsic)
    *_, init_db, init_dm, init_lane = sch.get_loops(init)
    for loop in (init_db, init_dm):
        sch.unroll(loop)
    sch.vectorize(init_lane)

    sch.reverse_compute_at(store, imo, preserve_unit_loops=True)
    *_, sm, sb, lane = sch.get_loops(store)
    for loop in (sm, sb):
        sch.unroll(loop)
    if aligned:
        sch.vectorize(lane)
    for loop in (ibi, imi):
        sch.unroll(loop)
    sch.vectorize(i)
    first = sch.decompose_reduction(scale, s)
    *_, zb, zm, zero_lane = sch.get_loops(first)
    for loop in (zb, zm):
        sch.unroll(loop)
    sch.vectorize(zero_lane)


def lower(request: Request) -> Kernel:
    """Workload, default or requested knobs, and this target's best instruction set."""
    group, affine = int(request.attrs["group"]), factors_of(request, SCALE)
    m, (n, k) = request.args[0].shape[0], request.args[CODES].shape
    scale_dtype = request.args[SCALE].dtype
    residual = request.op.endswith("_residual")
    geometry = Geometry(k, group)
    storage = storages.choose(int(request.attrs["bits"]), geometry.width)
    isa = isas.choose(request.target)
    x = interleave(n, isa.KNOBS["row_blocks"])
    knobs = default_knobs(m, n, geometry, storage, isa, request.target.l1d_kib_per_core) | dict(request.knobs)
    levels = None
    if request.table is not None:
        signed, unit = int8_levels(request.table)
        levels = (tuple(v + isa.TABLE_ZERO for v in signed), unit, isa.TABLE_ZERO)
    sch = s_tir.Schedule(
        tvm.IRModule({"main": workload(m, n, geometry, storage, scale_dtype, residual, affine, levels, x)})
    )
    on_x86 = request.target.arch == "x86_64"  # nobody has measured elsewhere what threads cost and bring
    parallel = not on_x86 or m > 1 or n * k * storage.bits // 8 > ALONE_BYTES
    template(
        sch,
        isas.register(isa.NAME, storage, levels and levels[0], knobs["prefetch_bytes"], knobs["prefetch_level"]),
        knobs,
        aligned=n == blocks(n) * LANES,
        many=m > 1,
        parallel=parallel,
    )
    kind = request.attrs.get("grid", storage.name)
    name = f"linear_{kind}a8_{isa.NAME}_m{m}_n{n}_k{k}_g{group}_s{scale_dtype[5:]}{name_tail(affine, residual)}"
    func = sch.mod["main"]
    if on_x86 and parallel:
        func = balanced(func)
    return Kernel(name, func, weight_packings(CODES, n, geometry, storage, scale_dtype, affine, x))


LOWERS = {
    f"quern.linear_int8{affine}{tail}": lower for affine in ("", "_offset", "_table") for tail in ("", "_residual")
}


def tuned_alike(request: Request) -> dict[str, int | str]:
    """What calls that share records agree in. A residual, scale's dtype and symmetry change few bytes."""
    m, (n, k) = request.args[0].shape[0], request.args[CODES].shape
    bits, group = int(request.attrs["bits"]), int(request.attrs["group"])
    kind = str(request.attrs.get("grid", affine_of(request.op)))
    return {"m": m, "n": n, "k": k, "bits": bits, "group": group, "kind": kind}


def space(request: Request) -> Space:
    """What tuning may try."""
    group = int(request.attrs["group"])
    m, (n, k) = request.args[0].shape[0], request.args[CODES].shape
    geometry, isa = Geometry(k, group), isas.choose(request.target)
    storage = storages.choose(int(request.attrs["bits"]), geometry.width)
    default = default_knobs(m, n, geometry, storage, isa, request.target.l1d_kib_per_core)

    def dividing(of: int, *values: int) -> tuple[int, ...]:
        return tuple(v for v in values if of % v == 0)

    def allowed(knobs: Mapping[str, int]) -> bool:
        asks = knobs["prefetch_bytes"] > 0 or knobs["prefetch_level"] == default["prefetch_level"]
        return asks and knobs["row_blocks"] * knobs["tokens"] <= MOST_ACCUMULATORS

    # Calls of few rows, which tuning does not time, need the prefetch of prompts.
    tried = {
        "row_blocks": dividing(blocks(n), 1, 2, 4, 8, 16),
        "tokens": dividing(m, 1, 2, 4, 8, 16) if m > 1 else (),
        "unroll": dividing(geometry.width // storage.inputs, 1, 2, 4, 8, 16),
        "prefetch_bytes": (0, 512, 1024, 2048, 4096) if m == 1 else (),
        "prefetch_level": (1, 2) if m == 1 else (),
    }
    name = f"linear_int8.{isa.NAME}"
    return Space.around(default, tried, schedule=name, workload=tuned_alike(request), macs=m * n * k, allowed=allowed)


SPACES = dict.fromkeys(LOWERS, space)
