"""NEON with int8 matrix instructions (Armv8.6, Cortex-X3, A715, A510): USDOT multiplies unsigned codes by signed bytes.

So 8-bit codes need no detour, else it is SDOT's schedule. Levels of table grids are signed: SDOT. Exact: no sum comes
near 2**31. This is for one token; prompts go through USMMLA, which multiplies twice as much an instruction
(schedules.linear_int8_smmla).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T

from schedules.isa import broadcast_quad, neon_dotprod
from schedules.storage import Storage, Table

NAME = "neon_i8mm"
NEEDS = ("neon", "dotprod", "i8mm")
RANK = 30
VECTOR = neon_dotprod.VECTOR
TABLE_ZERO = 0
KNOBS = neon_dotprod.KNOBS


def step(storage: Storage, table: Table | None, acc: Any, w: Sequence[Any], a: Sequence[Any]) -> Any:
    """See schedules.isa.Isa."""
    dot = "llvm.aarch64.neon.usdot" if table is None else "llvm.aarch64.neon.sdot"
    for value, quad in zip(neon_dotprod.codes_or_levels(storage, table, w), a, strict=True):
        codes = T.reinterpret("int8x16", value)
        acc = T.call_llvm_pure_intrin("int32x4", dot, acc, codes, broadcast_quad(quad, VECTOR))
    return acc
