"""What of the sweep of attention CI looks at: the kernels that hold most in registers or shared memory."""

from __future__ import annotations

import pytest

from tests.schedules.cuda.kernels import ALL, NANO, ORIN, SM90, XAVIER
from tests.schedules.cuda.sweep import SHARED_MOST, Case, cases, lowered, resources

EDGES = [
    Case(NANO, "float16", 1, 8, 256), Case(NANO, "float32", 128, 7, 256), Case(NANO, "int8", 1, 7, 128),
    Case(XAVIER, "float16", 128, 7, 256), Case(XAVIER, "int8", 1, 6, 192), Case(XAVIER, "float16", 128, 7, 128, 1),
    Case(ORIN, "float16", 128, 7, 128, 1), Case(ORIN, "int8", 128, 7, 192), Case(ORIN, "float32", 1, 8, 96),
    Case(ORIN, "float16", 128, 7, 64, 1), Case(SM90, "float16", 128, 7, 256), Case(SM90, "int8", 1, 8, 80),
]  # fmt: skip


@pytest.mark.parametrize("case", EDGES, ids=lambda c: f"{c.target.name}-{c.cache}-m{c.m}-{c.group}-{c.d}")
def test_nothing_spills(case: Case) -> None:
    used = resources(lowered(case), case.target)
    assert used.spill_bytes == 0 and used.shared_bytes <= SHARED_MOST


def test_the_sweep_is_whole() -> None:
    """All of these are in it; every kernel of it has another name; and two rows of heads are never one."""
    for target in ALL:
        found = list(cases(target))
        assert {case for case in EDGES if case.target == target} <= set(found)
        assert len({lowered(case).name for case in found}) == len(found) > 100
