"""The canonical form checks itself, and joins only what can be joined."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compiler.errors import UnsupportedError
from compiler.quant.ir import DenseWeight, QuantWeight, WeightType, join, order_digest


def weight(n: int = 2, k: int = 5, group_size: int = 2, fill: int = 0, **changed: Any) -> QuantWeight:
    groups = -(-k // group_size)
    parts: dict[str, Any] = {
        "stored": np.full((n, k), fill, np.uint8), "scale": np.ones((n, groups), np.float16),
        "zero": np.full((n, groups), 8, np.int16), "grid": "int4", "group_size": group_size, "permutation": None}
    return QuantWeight(**{**parts, **changed})


def test_type() -> None:
    assert weight().type == WeightType(2, 5, "int4", 2)
    assert (weight().type.groups, weight().type.bits, weight().type.dense) == (3, 4, False)
    dense = DenseWeight(np.zeros((3, 4), np.uint16), "bfloat16").type
    assert dense == WeightType(3, 4, "bfloat16", 0)
    assert (dense.groups, dense.bits, dense.dense) == (0, 16, True)


@pytest.mark.parametrize("changed", [
    {"stored": np.full((2, 5), 16, np.uint8)}, {"stored": np.zeros((2, 5), np.int8)},
    {"stored": np.zeros((2, 7), np.uint8)}, {"zero": np.full((2, 3), 16, np.int16)},
    {"zero": np.full((2, 3), -1, np.int16)}, {"zero": np.zeros((2, 3), np.uint8)},
    {"scale": np.full((2, 3), np.nan, np.float16)}, {"scale": np.ones((2, 2), np.float16)},
    {"scale": np.ones((2, 3), np.float64)}, {"grid": "nf4"}, {"grid": "int7"}, {"offset": np.zeros((2, 3), np.float32)},
    {"zero": np.zeros((2, 3), np.int16), "offset": np.zeros((2, 3), np.float16)}, {"group_size": 6},
    {"permutation": np.array([0, 1, 2, 3, 3], np.int32)}, {"permutation": np.arange(5)},
    {"zero": np.array([[8, 8, 8], [8, 8, 7]], np.int16), "symmetric": True},
])
def test_a_weight_that_breaks_the_contract_is_our_bug(changed: dict[str, Any]) -> None:
    weight()
    with pytest.raises(AssertionError):
        weight(**changed)


def test_join_stacks_rows() -> None:
    order = np.array([4, 3, 2, 1, 0], np.int32)
    joined = join([weight(2, fill=1, permutation=order), weight(3, fill=2, permutation=order.copy())])
    assert joined.type == WeightType(5, 5, "int4", 2, permuted=True, order=order_digest(order))
    assert joined.codes[:, 0].tolist() == [1, 1, 2, 2, 2]
    assert joined.permutation is not None
    dense = join([DenseWeight(np.full((1, 2), i, np.float16), "float16") for i in range(2)])
    assert dense.values.tolist() == [[0, 0], [1, 1]]


def test_join_of_float16_and_float32_scales_is_exact() -> None:
    joined = join([weight(1), weight(1, scale=np.full((1, 3), 1 / 3, np.float32))])
    assert joined.scale.dtype == np.float32
    assert joined.scale[:, 0].tolist() == [1.0, float(np.float32(1 / 3))]


def test_join_of_symmetric_weights_is_symmetric_where_all_are() -> None:
    symmetric, plain = weight(symmetric=True), weight()
    assert symmetric.type == WeightType(2, 5, "int4", 2, symmetric=True)
    assert symmetric.type.kind == plain.type.kind
    assert join([symmetric, symmetric]).symmetric
    assert not join([symmetric, plain]).symmetric
    assert symmetric.rows([1, 0]).symmetric


def test_join_refuses_what_differs() -> None:
    with pytest.raises(UnsupportedError) as error:
        join([weight(), weight(3, group_size=5)])
    assert str(error.value) == (
        "Weights that share an input must be joined, but these differ in kind: [2, 5] int4 with group size 2, [3, 5] "
        "int4 with group size 5. Quantise them alike.")
    with pytest.raises(UnsupportedError) as error:
        join([weight(), weight(permutation=np.arange(5, dtype=np.int32))])
    assert str(error.value) == (
        "Weights that share an input must be joined, but the act-orders of these differ. Quantise them with one order, "
        "or with desc_act = false.")


def offsets(n: int, value: float) -> QuantWeight:
    return weight(n, zero=np.zeros((n, 3), np.int16), offset=np.full((n, 3), value, np.float32))


def test_join_of_offsets() -> None:
    joined = join([offsets(1, 0.5), offsets(1, -1)])
    assert joined.offset is not None
    assert joined.offset[:, 0].tolist() == [0.5, -1]
    assert joined.type == WeightType(2, 5, "int4", 2, offset=True)
    with pytest.raises(UnsupportedError) as error:
        join([weight(), offsets(3, 1)])
    assert str(error.value) == (
        "Weights that share an input must be joined, but these differ in kind: [2, 5] int4 with group size 2, [3, 5] "
        "int4 with group size 2 and offsets. Quantise them alike.")


def test_kinds_that_can_be_joined() -> None:
    plain = WeightType(2, 4, "int4", 2)
    assert plain.kind == WeightType(3, 4, "int4", 2, "float32").kind
    assert plain.kind != WeightType(2, 4, "int4", 2, offset=True).kind
    ordered = WeightType(2, 4, "int4", 2, permuted=True, order="a")
    assert ordered.kind == WeightType(7, 4, "int4", 2, permuted=True, order="a").kind
    assert ordered.kind != WeightType(2, 4, "int4", 2, permuted=True, order="b").kind
    unread = WeightType(2, 4, "int4", 2, permuted=True)
    assert unread.kind != WeightType(2, 4, "int4", 2, permuted=True).kind  # unknown orders are never taken for equal


def test_rows_in_another_order() -> None:  # codes, scales, zeros and offsets move together; columns do not
    random = np.random.default_rng(0)
    scale, offset = (random.standard_normal((3, 2)).astype(np.float32) for _ in range(2))
    codes = random.integers(0, 16, (3, 8), np.uint8)
    moved = QuantWeight(codes, scale, np.zeros((3, 2), np.int16), "int4", 4, offset=offset).rows([2, 0, 1])
    assert moved.offset is not None
    assert np.array_equal(moved.codes, codes[[2, 0, 1]])
    assert np.array_equal(moved.scale, scale[[2, 0, 1]])
    assert np.array_equal(moved.offset, offset[[2, 0, 1]])
    values = random.standard_normal((3, 8)).astype(np.float16)
    assert np.array_equal(DenseWeight(values, "float16").rows([2, 0, 1]).values, values[[2, 0, 1]])
