"""Spans: by hand for the group sizes of real models, then what must hold for any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedules.geometry import MAX_SPAN, Geometry

HANDMADE = [  # k, group -> parts, span, width, spans, dense
    ((172, 43), (1, 43, 48, 4, False)),  # 43 is padded by 5
    ((172, 172), (2, 86, 88, 2, False)),  # too long for one span: two halves, padded by 2
    ((704, 704), (6, 118, 120, 6, False)),  # 704 / 128 takes 6 parts; the last has 114
    ((704, 128), (1, 128, 128, 6, False)),  # the last group has 64 inputs
    ((172, 128), (1, 128, 128, 2, False)),  # the last group has 44
    ((576, 576), (5, 116, 120, 5, False)),
    ((300, 200), (2, 100, 104, 4, False)),  # the last group's 100 inputs fill one part, the other stays empty
    ((256, 128), (1, 128, 128, 2, True)),
    ((256, 256), (2, 128, 128, 2, True)),
    ((8, 8), (1, 8, 8, 1, True)),
    ((5, 1), (1, 1, 8, 5, False)),
]


@pytest.mark.parametrize(("size", "want"), HANDMADE, ids=str)
def test_by_hand(size: tuple[int, int], want: tuple[int, int, int, int, bool]) -> None:
    g = Geometry(*size)
    assert (g.parts, g.span, g.width, g.spans, g.dense) == want


def test_places_of_43_by_hand() -> None:
    source = Geometry(172, 43).source
    assert source[0].tolist() == [*range(43), -1, -1, -1, -1, -1]
    assert source[3].tolist() == [*range(129, 172), -1, -1, -1, -1, -1]
    assert Geometry(172, 43).weight_group.tolist() == [0, 1, 2, 3]


def test_places_of_172_by_hand() -> None:
    source = Geometry(172, 172).source
    assert source.tolist() == [[*range(86), -1, -1], [*range(86, 172), -1, -1]]
    assert Geometry(172, 172).weight_group.tolist() == [0, 0]


def test_places_of_704_by_hand() -> None:
    source = Geometry(704, 704).source
    assert source[4].tolist() == [*range(472, 590), -1, -1]
    assert source[5].tolist() == [*range(590, 704), *[-1] * 6]


def test_a_short_last_group_by_hand() -> None:
    assert Geometry(10, 8).source.tolist() == [[*range(8)], [8, 9, -1, -1, -1, -1, -1, -1]]
    g = Geometry(300, 200)
    assert g.source[2].tolist() == [*range(200, 300), *[-1] * 4]
    assert (g.source[3] == -1).all()
    assert g.weight_group.tolist() == [0, 0, 1, 1]


@given(k=st.integers(1, 900), group=st.integers(1, 900))
def test_every_input_has_one_place_in_a_span_of_its_group(k: int, group: int) -> None:
    g = Geometry(k, min(group, k))
    assert g.source.shape == (g.spans, g.width)
    assert g.span <= MAX_SPAN
    assert g.width % 8 == 0 and 0 <= g.width - g.span < 8
    span, _ = np.nonzero(g.source >= 0)
    inputs = g.source[g.source >= 0]
    assert inputs.tolist() == list(range(k))  # each once, in order
    assert np.array_equal(g.weight_group[span], inputs // g.group)
    assert g.dense == np.array_equal(g.source.reshape(-1), np.arange(k))
