"""Integer linear layers: packed 4- or 8-bit weights, int8 activations, one fp32 scale per (row, span).

    out[m, n] = (residual[m, n] +) sum over spans s of
                ascale[m, s] * scale[n, s] * (sum_i code[n, s, i] * q[m, s, i] - zero[n, s] * asum[m, s])

The zero point meets the span's activation sum, so the inner loop sees unsigned codes only. One workload in plain TIR,
one template; the instruction set is a `tensorize` away (schedules.isa). Layout: schedules.packed.
Operators (arguments in order):
  quern.linear_int8           q i8[m, spans, 2, width / 2], ascale f32[m, spans], asum i32[m, spans],
                              codes u8[n, k], scale f16|f32[n, groups], zero i16[n, groups]; bits, group -> f32[m, n]
  quern.linear_int8_residual  the same, then residual f32[m, n]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import s_tir
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules import isa as isas
from schedules.geometry import Geometry
from schedules.isa import LANES, QUAD, fields
from schedules.kernel import Kernel, Request
from schedules.packed import blocks, code_packing, scale_packing, stored_bits, zero_dtype, zero_packing

CODES, SCALE, ZERO = 3, 4, 5  # argument positions of the weight
ROOMY_L1D_KIB = 48


def workload(m: int, n: int, geometry: Geometry, bits: int, scale_dtype: str, residual: bool) -> Any:
    """The layer in plain TIR: blocks `dot` (int32 per span), `scale` (fp32 over spans), `store` (residual, padding)."""
    nb, spans, width, count = blocks(n), geometry.spans, geometry.width, fields(bits)
    steps, half = width // (QUAD * count), width // 2
    quads = half // QUAD
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
            q = T.arg("q", T.buffer((m, spans, 2, half), "int8"))
            ascale = T.arg("ascale", T.buffer((m, spans), "float32"))
            asum = T.arg("asum", T.buffer((m, spans), "int32"))
            codes = T.arg("codes", T.buffer((nb, spans, steps, LANES, QUAD), "uint8"))
            scale = T.arg("scale", T.buffer((nb, spans, LANES), scale_dtype))
            zero = T.arg("zero", T.buffer((nb, spans, LANES), zero_dtype(bits)))
            base = T.arg("residual", T.buffer((m, n), "float32")) if residual else None
            out = T.arg("out", T.buffer((m, n), "float32"))
            with T.sblock("root"):
                total = T.sblock_alloc_buffer((m, nb, spans, LANES), "int32")
                acc = T.sblock_alloc_buffer((m, nb, LANES), "float32")
                by_field = (count,) if count > 1 else ()
                with T.grid(m, nb, spans, steps, *by_field, LANES, QUAD) as (im, ib, s, j, *h, i, b):
                    with T.sblock("dot"):
                        kinds = "SSSR" + "R" * len(h) + "SR"
                        vm, vb, vs, vj, *vh, vi, vq = T.axis.remap(kinds, [im, ib, s, j, *h, i, b])
                        with T.init():
                            T.buffer_store(total, T.int32(0), [vm, vb, vs, vi])
                        code = codes[vb, vs, vj, vi, vq]
                        for f in vh:
                            shift = T.Cast("uint8", f * bits)
                            code = T.bitwise_and(T.shift_right(code, shift), T.uint8((1 << bits) - 1))
                        side = vh[0] if vh else T.floordiv(vj, quads)
                        place = (vj if vh else T.floormod(vj, quads)) * QUAD + vq
                        product = T.Cast("int32", code) * T.Cast("int32", q[vm, vs, side, place])
                        T.buffer_store(total, total[vm, vb, vs, vi] + product, [vm, vb, vs, vi])
                with T.grid(m, nb, spans, LANES) as (im, ib, s, i):
                    with T.sblock("scale"):
                        vm, vb, vs, vi = T.axis.remap("SSRS", [im, ib, s, i])
                        with T.init():
                            T.buffer_store(acc, T.float32(0), [vm, vb, vi])
                        centred = total[vm, vb, vs, vi] - T.Cast("int32", zero[vb, vs, vi]) * asum[vm, vs]
                        factor = T.Cast("float32", scale[vb, vs, vi]) * ascale[vm, vs]
                        T.buffer_store(acc, acc[vm, vb, vi] + T.Cast("float32", centred) * factor, [vm, vb, vi])
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


def default_knobs(m: int, n: int, geometry: Geometry, bits: int, isa: isas.Isa, l1d_kib: int | None) -> dict[str, int]:
    """The template's stated default for a shape: the ISA's measured choice, cut down to what divides the shape.

    Row blocks lie a power of two apart, so their lines meet in few sets of the first-level cache. Prefetching eight
    streams into 32 KiB threw out what was still needed (19 against 26 GB/s on Zen 4); into the second level it did
    not. With 48 KiB (Sapphire Rapids) the first level was the better place.
    """
    steps = geometry.width // (QUAD * fields(bits))
    gemm = "gemm_" if m > 1 else ""
    return {
        "row_blocks": _largest_divisor(blocks(n), isa.KNOBS[f"{gemm}row_blocks"]),
        "tokens": _largest_divisor(m, isa.KNOBS["gemm_tokens"]) if m > 1 else 1,
        "unroll": _largest_divisor(steps, isa.KNOBS[f"{gemm}unroll"]),
        "prefetch_bytes": isa.KNOBS["prefetch_bytes"] if m == 1 else 0,
        "prefetch_level": 1 if (l1d_kib or 0) >= ROOMY_L1D_KIB else 2,
    }


def template(sch: Any, intrinsic: str, knobs: Mapping[str, Any], aligned: bool) -> None:
    """Rows in parallel, then tokens, then spans; row_blocks x tokens accumulators stay in registers over a span.

    `knobs` may hold integers or sampled random variables of a MetaSchedule trace; the trace has the same steps for all.
    """
    dot, scale, store = (sch.get_sblock(name) for name in ("dot", "scale", "store"))
    im, ib, s, i = sch.get_loops(scale)
    ibo, ibi = sch.split(ib, [None, knobs["row_blocks"]])
    imo, imi = sch.split(im, [None, knobs["tokens"]])
    sch.reorder(ibo, imo, s, ibi, imi, i)
    sch.parallel(ibo)

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
    bits, group = stored_bits(int(request.attrs["bits"])), int(request.attrs["group"])
    m, (n, k) = request.args[0].shape[0], request.args[CODES].shape
    scale_dtype = request.args[SCALE].dtype
    residual = request.op.endswith("_residual")
    geometry = Geometry(k, group)
    isa = isas.choose(request.target)
    knobs = default_knobs(m, n, geometry, bits, isa, request.target.l1d_kib_per_core) | dict(request.knobs)
    sch = s_tir.Schedule(tvm.IRModule({"main": workload(m, n, geometry, bits, scale_dtype, residual)}))
    template(
        sch,
        isas.register(isa.NAME, bits, knobs["prefetch_bytes"], knobs["prefetch_level"]),
        knobs,
        aligned=n == blocks(n) * LANES,
    )
    name = f"linear_w{bits}a8_{isa.NAME}_m{m}_n{n}_k{k}_g{group}_s{scale_dtype[5:]}{'_residual' if residual else ''}"
    return Kernel(
        name=name,
        func=sch.mod["main"],
        packings={
            CODES: code_packing(n, geometry, bits),
            SCALE: scale_packing(n, geometry, scale_dtype),
            ZERO: zero_packing(n, geometry, bits),
        },
    )


LOWERS = {"quern.linear_int8": lower, "quern.linear_int8_residual": lower}
