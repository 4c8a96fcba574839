"""The living definition: what a quantised weight means and what the integer path computes, in plain numpy.

Letters: m tokens, n output features, k input features. Kernels and decoders are tested against this file; nothing here
is meant to be fast. `source` and `weight_group` come from the schedules' geometry: source i64[spans, width] is the
input index of every stored place (-1 = padding), weight_group i64[spans] the weight group of every span.
"""
from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compiler.quant.grids import GRIDS
from compiler.quant.ir import DenseWeight, QuantWeight

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
QMAX = 127  # activations use -127..127, so that -q always exists


def dequantize(w: QuantWeight | DenseWeight) -> F32:
    """f32[n, k] in the order of the original inputs: scale * (grid[code] - zero) + offset, or the dense values.

    One float32 rounding an operation. On an integer grid with a float16 scale and no offset the result is exact: 11
    bits of scale times at most 9 bits of difference fit float32's 24.
    """
    if isinstance(w, DenseWeight):
        return widen(w.values, w.dtype)
    group = np.arange(w.type.k) // w.group_size
    zero = w.zero[:, group].astype(np.float32)
    stored = w.scale.astype(np.float32)[:, group] * (GRIDS[w.grid].table[w.codes] - zero)
    if w.offset is not None:
        stored += w.offset[:, group]
    if w.permutation is None:
        return stored
    out = np.empty_like(stored)
    out[:, w.permutation] = stored
    return out


def widen(values: NDArray[Any], dtype: str) -> F32:
    """Any dense storage as float32, exactly. bfloat16 comes as uint16 bits: the upper half of a float32."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def quantize_activations(x: F32, source: I64) -> tuple[NDArray[np.int8], F32, NDArray[np.int32]]:
    """x f32[m, k] -> (q i8[m, spans, width], scale f32[m, spans], sum i32[m, spans]), all arithmetic in float32.

    scale = amax / 127, q = rint(x * (127 / amax)) with ties to even, sum = sum of q. Padding is 0. A span whose
    amax is 0, or so small that 127 / amax overflows (below 3.8e-37), has q = 0.
    """
    padded = np.where(source >= 0, x[:, source], np.float32(0)).astype(np.float32)
    amax = np.abs(padded).max(axis=2)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(QMAX) / amax
    inverse = np.where(np.isfinite(inverse), inverse, np.float32(0))
    q = np.rint(padded * inverse[:, :, None]).clip(-QMAX, QMAX).astype(np.int8)
    return q, amax / np.float32(QMAX), q.sum(axis=2, dtype=np.int32)


def integer_form(w: QuantWeight) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """(integers i16[n, k], scale f32[n, groups]) that the integer path multiplies with: w ~ scale * (integer - zero).

    Codes on an integer grid. A table grid becomes int8 levels of `unit`: the only place where weights lose anything.
    """
    grid = GRIDS[w.grid]
    scale = w.scale.astype(np.float32)
    if grid.values is None:
        return w.codes.astype(np.int16), scale
    return grid.int8_levels[w.codes].astype(np.int16), scale * grid.unit


def matmul_int8(x: F32, w: QuantWeight, source: I64, weight_group: I64) -> F32:
    """x[m, k] times w[n, k] transposed, with int8 activations: f32[m, n].

    y = sum over spans of scale_x * (scale_w * (q . integers - zero * sum) + offset * sum): dot products and sums are
    exact integers, the sum over spans is taken in float64 and rounded once, so a float32 kernel may differ by its own
    rounding only.
    """
    if w.permutation is not None:
        x = x[:, w.permutation]
    q, scale, total = quantize_activations(x, source)
    integers, wscale = integer_form(w)
    codes = np.where(source >= 0, integers[:, source], 0).astype(np.float64)
    y = np.zeros((x.shape[0], w.type.n))
    for span, group in enumerate(weight_group):
        dot = q[:, span].astype(np.float64) @ codes[:, span].T
        dot -= np.outer(total[:, span], w.zero[:, group])
        y += np.outer(scale[:, span].astype(np.float64), wscale[:, group].astype(np.float64)) * dot
        if w.offset is not None:
            y += np.outer(scale[:, span].astype(np.float64) * total[:, span], w.offset[:, group].astype(np.float64))
    return y.astype(np.float32)


def matmul_exact(x: F32, w: QuantWeight | DenseWeight) -> F32:
    """x[m, k] times the dequantised w[n, k] transposed, summed in float64 and rounded once: f32[m, n]."""
    return (x.astype(np.float64) @ dequantize(w).astype(np.float64).T).astype(np.float32)
