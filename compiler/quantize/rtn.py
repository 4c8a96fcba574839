"""Round to nearest: every group by itself, no calibration data. The floor that other methods have to beat.

Root-mean-square error of the weights, relative to their own, over all linear layers of our 5.2M-parameter Llama
(storyteller-5m) at 4 bits with group size 128 | 32, the scale always rounded to float16:
    scale = amax / 7, codes 1..15                    11.77 % | 9.71 %
    scale = (the value of largest size) / -8         10.34 % | 8.60 %   as llama.cpp's Q4_0
    the same, best of SHRINK                          9.73 % | 8.20 %   <- symmetric
    asymmetric, (max - min) / 15                     10.08 % | 8.08 %
    the same, best of SHRINK                          9.57 % | 7.76 %   <- asymmetric
At 8 bits the search gains little (0.65 % against 0.63 %, asymmetric 0.59 %), so scale = amax / 127 and codes 1..255.
"""
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compiler.errors import FormatError, UnsupportedError
from compiler.quant.grids import Grid, integer_grid
from compiler.quant.ir import DenseWeight, QuantWeight
from compiler.quant.reference import F32, widen

BITS = (4, 8)
GROUP_SIZES = (128, 64, 32)
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 1.05, 1.1)  # tried in this order; on a tie the first stays
BLOCK_WEIGHTS = 1 << 18  # weights worked on at a time, so that the float32 copies stay small
F16_MAX = float(np.finfo(np.float16).max)
F16_TINY = np.finfo(np.float16).smallest_subnormal


def default_group_size(k: int) -> int:
    """The largest of 128, 64 and 32 that divides k; else 32, with a short last group."""
    return next((size for size in GROUP_SIZES if k % size == 0), GROUP_SIZES[-1])


def quantize(w: DenseWeight, bits: int, group_size: int, symmetric: bool = True, where: str = "weight") -> QuantWeight:
    """w to the integer grid of `bits` bits (4 or 8), one float16 scale per row and group of at most k inputs.

    Codes are chosen with the scale as float16 has it, so its rounding costs no accuracy. Symmetric: zero 8 or 128.
    Raises FormatError, which starts with `where`, when a weight is not finite or too large for a float16 scale.
    """
    if bits not in BITS:
        raise UnsupportedError(f"Round-to-nearest has {' and '.join(map(str, BITS))} bits, not {bits}.")
    grid = integer_grid(bits)
    n, k = w.values.shape
    size = min(group_size, k)
    groups = -(-k // size)
    codes = np.empty((n, k), np.uint8)
    scale = np.empty((n, groups), np.float16)
    zero = np.empty((n, groups), np.int16)
    step = max(1, BLOCK_WEIGHTS // k)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        x = _grouped(widen(w.values[rows], w.dtype), size)
        if not np.isfinite(x).all():
            raise FormatError(f"{where} has values that are not finite. The checkpoint is damaged: fetch it again.")
        block_codes, scale[rows], zero[rows] = _block(x, grid, symmetric, where)
        codes[rows] = block_codes.reshape(x.shape[0], -1)[:, :k]
    return QuantWeight(codes, scale, zero, grid.name, size, symmetric=symmetric)


def _grouped(x: F32, size: int) -> F32:
    """f32[rows, k] -> f32[rows, groups, size], the short last group filled up with zeros (which cost no error)."""
    rows, k = x.shape
    groups = -(-k // size)
    if groups * size != k:
        x = np.pad(x, ((0, 0), (0, groups * size - k)))
    return x.reshape(rows, groups, size)


def _block(x: F32, grid: Grid, symmetric: bool, where: str,
           ) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.int16]]:
    """Codes u8[rows, groups, size], scale and zero [rows, groups] with the least squared error of the scales tried."""
    step, center = _widest(x, grid, symmetric)
    if np.abs(step).max() * max(SHRINK) > F16_MAX:
        raise FormatError(f"{where} has values up to {np.abs(x).max():g}, too large for float16 scales. Weights of a "
                          f"working model are far smaller: fetch the checkpoint again.")
    lowest = 1 if symmetric and grid.bits == 8 else 0
    best, least = step, np.full(step.shape, np.inf, np.float32)
    for shrink in SHRINK if grid.bits < 8 else ():
        tried = step * np.float32(shrink)
        codes, scale, zero = _encode(x, tried, center, grid, lowest)
        codes -= zero[..., None]
        codes *= scale[..., None]
        codes -= x
        error = np.einsum("rgk,rgk->rg", codes, codes)
        better = error < least
        best, least = np.where(better, tried, best), np.where(better, error, least)
    codes, scale, zero = _encode(x, best, center, grid, lowest)
    return codes.astype(np.uint8), scale.astype(np.float16), zero.astype(np.int16)


def _widest(x: F32, grid: Grid, symmetric: bool) -> tuple[F32, F32 | None]:
    """(step that covers the whole group, middle of the covered range or None when 0 must be the middle)."""
    if not symmetric:
        low, high = np.minimum(x.min(axis=2), 0), np.maximum(x.max(axis=2), 0)  # 0 stays a code: zero in 0..levels-1
        return (high - low) / np.float32(grid.levels - 1), (high + low) / 2
    if grid.bits == 8:
        return np.abs(x).max(axis=2) / np.float32(grid.middle - 1), None
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=2)[..., None], axis=2)[..., 0]
    return extreme / np.float32(-grid.middle), None  # code 0, the longer side, takes the extreme value


def _encode(x: F32, step: F32, center: F32 | None, grid: Grid, lowest: int) -> tuple[F32, F32, F32]:
    """Codes, scale (a float16 value) and zero of each group for one step, all as float32."""
    half = step.astype(np.float16)
    half = np.where((half == 0) & (step != 0), np.copysign(F16_TINY, half), half)  # never flush a group to zero
    scale = half.astype(np.float32)
    divisor: F32 = np.where(scale == 0, np.float32(1), scale)
    if center is None:
        zero = np.full(step.shape, grid.middle, np.float32)
    else:
        zero = np.rint(np.float32((grid.levels - 1) / 2) - center / divisor).clip(0, grid.levels - 1)
    codes: F32 = x / divisor[..., None]
    np.rint(codes, out=codes)
    codes += zero[..., None]
    codes.clip(lowest, grid.levels - 1, out=codes)
    return codes, scale, zero
