"""The PrimFunc around an integer linear layer that is written by hand, in place of a workload and a template."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm.script.ir_builder import tirx as T

from schedules import vector
from schedules.geometry import Geometry
from schedules.packed import blocks
from schedules.storage import LANES, QUAD, Storage


@contextmanager
def linear_function(
    name: str, m: int, n: int, geometry: Geometry, storage: Storage, scale_dtype: str, affine: str, residual: bool,
    x: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The open body, in an IRBuilder: buffers by name, q, ascale, asum, codes, scale, zero or offset as `affine` says,
    residual if there is one, out. Shapes as in schedules/packed.py, of blocks in groups of x.
    """
    nb, spans, width = blocks(n), geometry.spans, geometry.width
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "q": ((m, spans, width), "int8"),
        "ascale": ((m, spans), "float32"),
        "asum": ((m, spans), "int32"),
        "codes": ((nb // x, spans, width // storage.inputs, x, storage.vectors, LANES, QUAD), "uint8"),
        "scale": ((nb // x, spans, x, LANES), scale_dtype),
    }
    if affine == "one_zero":
        shapes["zero"] = ((1,), "uint8")
    elif affine != "table":
        shapes[affine] = ((nb // x, spans, x, LANES), "uint8" if affine == "zero" else "float32")
    if residual:
        shapes["residual"] = ((m, n), "float32")
    shapes["out"] = ((m, n), "float32")
    with T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        buffers = {label: T.arg(label, T.buffer(*spec, layout=None)) for label, spec in shapes.items()}
        regions = {label: buffers[label][tuple(slice(0, d) for d in shape)] for label, (shape, _) in shapes.items()}
        with T.sblock("linear"):
            T.reads(*(region for label, region in regions.items() if label != "out"))
            T.writes(regions["out"])
            yield buffers


def ask_codes(codes: Any, block: Any, span: Any, step: Any, ahead: int = 0, level: int = 2) -> None:
    """Ask for a step of a block's codes, or for what lies `ahead` bytes behind it, into a cache."""
    _, spans, steps, x, vectors, *_ = codes.shape
    index = ((block // x * spans + span) * steps + step) * x + block % x
    for v in range(int(vectors)):
        vector.prefetch(codes, (index * int(vectors) + v) * (LANES * QUAD) + ahead, level)


def zeros_of(buffer: Any, place: tuple[Any, ...], lanes: int) -> Any:
    """int32 vector of zero points: those of `lanes` rows from `place` on, or the one that all rows have."""
    if len(buffer.shape) == 1:
        return T.broadcast(T.Cast("int32", buffer[0]), lanes)
    *outer, first = place
    return T.Cast(f"int32x{lanes}", buffer[(*outer, T.ramp(first, 1, lanes))])
