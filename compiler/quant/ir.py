"""The one form every weight has after decoding: canonical codes, or dense values. Nothing downstream knows a format.

Letters: n = output features, k = input features, g = group size. Always w = scale * (grid[code] - zero) + offset, with
the scale, zero and offset of the row and of group k // g; the last group is short when g does not divide k.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from compiler.errors import UnsupportedError
from compiler.quant.codes import Codes, PackedRows, stack
from compiler.quant.grids import GRIDS

DENSE_STORAGE: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16), "float32": np.dtype(np.float32),
}
ACTIVATIONS = ("any", "int8-token", "int8-static")


@dataclass(frozen=True)
class WeightType:
    """Shape and kind of a weight [n, k]. grid is "int4", "nf4"... or a dense dtype name, which has group_size 0.

    scale is the element type of the scales, float16 or float32; it says nothing of a dense weight.
    offset: there is a float32 offset a group. permuted: inputs must be gathered first (act-order); `order` is then the
    digest of the permutation (`order_digest`), or "" when only reading the data would tell.
    symmetric: every zero is the grid's middle. False where zeros may differ, and where there are none to differ: of a
    dense weight, a table grid, an offset.
    activations: what the weight was made for: "any", or where the checkpoint quantises activations itself "int8-token"
    (a scale a token, found at run time) or "int8-static" (one stored scale). A remark: it changes no arithmetic.
    """

    n: int
    k: int
    grid: str
    group_size: int
    scale: str = "float16"
    offset: bool = False
    permuted: bool = False
    activations: str = "any"
    order: str = ""
    symmetric: bool = False

    def __post_init__(self) -> None:
        assert min(self.n, self.k) > 0, self
        assert self.grid in GRIDS or self.grid in DENSE_STORAGE, f"unknown grid {self.grid!r}"
        assert (self.group_size == 0) == self.dense, self
        assert self.group_size <= self.k, self
        assert self.scale in ("float16", "float32"), self
        assert self.activations in ACTIVATIONS, self
        assert self.permuted or not self.order, self
        assert not (self.dense and (self.offset or self.permuted)), self
        assert not (self.offset and self.table), self
        assert not (self.symmetric and (self.dense or self.offset or self.table)), self

    @property
    def dense(self) -> bool:
        """True when values are stored as they are."""
        return self.grid in DENSE_STORAGE

    @property
    def table(self) -> bool:
        """True when codes stand for the values of a table."""
        return not self.dense and GRIDS[self.grid].values is not None

    @property
    def bits(self) -> int:
        """Stored bits per weight, without scales."""
        return DENSE_STORAGE[self.grid].itemsize * 8 if self.dense else GRIDS[self.grid].bits

    @property
    def groups(self) -> int:
        """Scales per row; 0 when dense."""
        return 0 if self.dense else -(-self.k // self.group_size)

    @property
    def kind(self) -> tuple[object, ...]:
        """Weights of equal kind may be joined along n, symmetric ones with others. An unknown order equals no other."""
        order = object() if self.permuted and not self.order else self.order
        return (self.k, self.grid, self.group_size, self.offset, self.permuted, order)


@dataclass(frozen=True, eq=False)
class QuantWeight:
    """codes u8[n, k], scale f16|f32[n, groups], zero i16[n, groups], groups = ceil(k / group_size).

    `stored` has the codes, as an array or still in the checkpoint's packing; `codes` unpacks all of them.
    permutation (act-order): None, or i32[k] where stored column j holds original input permutation[j]; whoever
    multiplies must gather x[permutation] first. offset: None, or f32[n, groups] added to every weight of the group.
    Codes and zeros are below the grid's number of levels, scales and offsets finite. zero is 0 on table grids and where
    there is an offset. symmetric: every zero is the grid's middle, and kernels are told so.
    """

    stored: NDArray[np.uint8] | PackedRows | Codes
    scale: NDArray[Any]
    zero: NDArray[np.int16]
    grid: str
    group_size: int
    permutation: NDArray[np.int32] | None = None
    offset: NDArray[np.float32] | None = None
    activations: str = "any"
    symmetric: bool = False

    def __post_init__(self) -> None:
        assert self.grid in GRIDS, f"unknown grid {self.grid!r}"
        n, k = self.stored.shape
        assert 0 < self.group_size <= k, (self.group_size, k)
        want = (n, -(-k // self.group_size))
        assert self.scale.dtype in (np.float16, np.float32), self.scale.dtype
        assert self.zero.dtype == np.int16, self.zero.dtype
        assert self.scale.shape == self.zero.shape == want, (self.scale.shape, self.zero.shape, want)
        levels = GRIDS[self.grid].levels
        if self.offset is not None:
            assert self.offset.dtype == np.float32 and self.offset.shape == want, (self.offset.dtype, self.offset.shape)
            assert np.isfinite(self.offset).all(), "an offset is not finite"
        if self.offset is not None or GRIDS[self.grid].values is not None:
            assert not self.zero.any(), "a table grid or an offset leaves no zero point"
        for part in self.parts.parts:
            if isinstance(part, np.ndarray):
                assert part.dtype == np.uint8, part.dtype
                assert levels == 256 or int(part.max()) < levels, f"a code is not below {levels}"
            else:
                assert 1 << part.bits == levels, part.bits
        assert int(self.zero.view(np.uint16).max()) < levels, f"a zero is outside 0..{levels - 1}"
        assert not self.symmetric or (self.zero == GRIDS[self.grid].middle).all(), "a zero is not the grid's middle"
        assert all_finite(self.scale), "a scale is not finite"
        if self.permutation is not None:
            assert self.permutation.dtype == np.int32, self.permutation.dtype
            assert np.array_equal(np.sort(self.permutation), np.arange(k)), "not a permutation"

    @property
    def codes(self) -> NDArray[np.uint8]:
        """u8[n, k], unpacked anew at every call."""
        return self.parts.array()

    @property
    def parts(self) -> Codes:
        """The codes as they are stored."""
        return self.stored if isinstance(self.stored, Codes) else Codes((self.stored,))

    @property
    def type(self) -> WeightType:
        """Shape and kind."""
        n, k = self.stored.shape
        permuted = self.permutation is not None
        order = "" if self.permutation is None else order_digest(self.permutation)
        return WeightType(n, k, self.grid, self.group_size, str(self.scale.dtype), self.offset is not None, permuted,
                          self.activations, order, self.symmetric)

    def rows(self, order: Sequence[int]) -> QuantWeight:
        """The same weight with row order[i] in place i."""
        places = np.asarray(order)
        offset = None if self.offset is None else self.offset[places]
        return replace(self, stored=self.codes[places], scale=self.scale[places], zero=self.zero[places], offset=offset)


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """values [n, k] as float16, float32, or the uint16 bits of bfloat16; dtype names which."""

    values: NDArray[Any]
    dtype: str

    def __post_init__(self) -> None:
        assert self.values.ndim == 2, self.values.shape
        assert self.values.dtype == DENSE_STORAGE[self.dtype], (self.values.dtype, self.dtype)

    @property
    def type(self) -> WeightType:
        """Shape and kind."""
        n, k = self.values.shape
        return WeightType(n, k, self.dtype, 0)

    def rows(self, order: Sequence[int]) -> DenseWeight:
        """The same weight with row order[i] in place i."""
        return DenseWeight(self.values[np.asarray(order)], self.dtype)


@overload
def join(weights: Sequence[QuantWeight]) -> QuantWeight: ...
@overload
def join(weights: Sequence[DenseWeight]) -> DenseWeight: ...
@overload
def join(weights: Sequence[QuantWeight | DenseWeight]) -> QuantWeight | DenseWeight: ...
def join(weights: Sequence[QuantWeight] | Sequence[DenseWeight] | Sequence[QuantWeight | DenseWeight],
         ) -> QuantWeight | DenseWeight:
    """One weight with the rows of all, in order: q, k, v or gate, up read the same x.

    Raises UnsupportedError unless k, kind, group size, presence of offsets and permutation agree. Scales of float16 and
    float32 meet as float32, which is exact. The result is symmetric where all are.
    """
    if len(weights) == 1:
        return weights[0]
    types = [w.type for w in weights]
    if len({(t.k, t.grid, t.group_size, t.offset) for t in types}) > 1:
        got = ", ".join(f"[{t.n}, {t.k}] {t.grid} with group size {t.group_size}{' and offsets' if t.offset else ''}"
                        for t in types)
        raise UnsupportedError(f"Weights that share an input must be joined, but these differ in kind: {got}. "
                               f"Quantise them alike.")
    dense = [w for w in weights if isinstance(w, DenseWeight)]
    if dense:
        return DenseWeight(np.concatenate([w.values for w in dense]), dense[0].dtype)
    quantised = [w for w in weights if isinstance(w, QuantWeight)]
    first = quantised[0]
    if not all(_same_order(first.permutation, w.permutation) for w in quantised):
        raise UnsupportedError("Weights that share an input must be joined, but the act-orders of these differ. "
                               "Quantise them with one order, or with desc_act = false.")
    offsets = [w.offset for w in quantised if w.offset is not None]
    return QuantWeight(
        stack([w.parts for w in quantised]),
        np.concatenate([w.scale for w in quantised]),
        np.concatenate([w.zero for w in quantised]),
        first.grid, first.group_size, first.permutation,
        np.concatenate(offsets) if offsets else None, first.activations, all(w.symmetric for w in quantised))


def all_finite(values: NDArray[Any]) -> bool:
    """Whether no value is NaN or infinite. float16 is told by its exponent: numpy widens it first, ten times slower."""
    if values.dtype == np.float16:
        return bool(((values.view(np.uint16) & np.uint16(0x7C00)) != np.uint16(0x7C00)).all())
    return bool(np.isfinite(values).all())


def order_digest(permutation: NDArray[np.int32]) -> str:
    """A short name of a permutation: equal digests mean equal permutations."""
    return hashlib.blake2s(np.ascontiguousarray(permutation, "<i4").tobytes(), digest_size=12).hexdigest()


def _same_order(a: NDArray[np.int32] | None, b: NDArray[np.int32] | None) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b)
