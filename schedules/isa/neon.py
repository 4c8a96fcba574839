"""NEON: the generic multiply-add, with TBL for table grids, which looks 16 codes up in one register of levels.

The choices of the generic look-up cost an A72 ten times the instructions of its multiplications.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T

from schedules.isa import broadcast_table, generic
from schedules.storage import Storage, Table

NAME = "neon"
NEEDS = ("neon",)
RANK = 5
VECTOR = 4
TABLE_ZERO = 0
KNOBS = generic.KNOBS


def _look_up(table: Table, codes: Any) -> Any:
    return T.call_llvm_pure_intrin("int8x16", "llvm.aarch64.neon.tbl1", broadcast_table(table, VECTOR), codes)


def step(storage: Storage, table: Table | None, acc: Any, w: Sequence[Any], a: Sequence[Any]) -> Any:
    """See schedules.isa.Isa."""
    return generic.dot(VECTOR, _look_up, storage, table, acc, w, a)
