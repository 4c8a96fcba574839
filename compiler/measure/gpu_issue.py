"""How long a multiprocessor is busy with what its warps execute (ptx_walk.py). A model, by NVIDIA's published rates.

Rates are results a clock and multiprocessor: CUDA C++ Programming Guide, "Throughput of Native Arithmetic
Instructions", columns 5.3, 7.x, 8.6 (8.7 has no own) and 9.0; half precision counts pairs here. It lists no dp4a: as
integer multiplication. From sm_70 on fp16 becomes fp32 in the fp16 units, and from sm_80 on fp32 becomes fp16 in those
for integers: so machine code has it (nvdisasm: HADD2.F32, F2FP). On sm_53 products of integers are three XMADs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from compiler.codegen.nvrtc import Resources
from compiler.measure import ptx
from compiler.measure.ptx import Function
from compiler.measure.ptx_walk import Executed

WARPS_A_CLOCK = 4  # schedulers of a multiprocessor; Maxwell's second instruction of a clock is left out
SCALE = (0.8, 1.3)  # machine code by PTX, at most: beyond are paths for denormals and unrolled loops, rarely executed


@dataclass(frozen=True)
class Chip:
    """A multiprocessor. rates: results a clock by kind of instruction. pipes: kinds that share units.

    macs: multiply-adds a clock of its tensor cores, by bits of an operand. step: clocks until a result can be used.
    threads, blocks, registers, shared_bytes: what it holds at a time (CUDA C++ Programming Guide, "Technical
    Specifications per Compute Capability").
    """

    rates: Mapping[int, float]
    pipes: tuple[tuple[int, ...], ...]
    macs: Mapping[int, float]
    step: int
    threads: int
    blocks: int
    shared_bytes: int
    registers: int = 65536


CORE = (ptx.FLOAT, ptx.HALF, ptx.INTEGER, ptx.LOGIC, ptx.SHIFT, ptx.COMPARE, ptx.MULTIPLY, ptx.DOT)
FMA = (ptx.FLOAT, ptx.MULTIPLY, ptx.DOT)
ALU = (ptx.INTEGER, ptx.LOGIC, ptx.SHIFT, ptx.COMPARE)
SLOW = (ptx.CONVERT, ptx.SPECIAL)
MAXWELL = {
    ptx.FLOAT: 128, ptx.HALF: 128, ptx.INTEGER: 128, ptx.LOGIC: 128, ptx.SHIFT: 64, ptx.COMPARE: 64,
    ptx.MULTIPLY: 128 / 3, ptx.DOT: 32, ptx.TO_FLOAT: 32, ptx.TO_HALF: 32, ptx.CONVERT: 32, ptx.SPECIAL: 32,
    ptx.SHUFFLE: 32,
}  # fmt: skip
VOLTA = {
    ptx.FLOAT: 64, ptx.HALF: 64, ptx.INTEGER: 64, ptx.LOGIC: 64, ptx.SHIFT: 64, ptx.COMPARE: 64, ptx.MULTIPLY: 64,
    ptx.DOT: 64, ptx.TO_FLOAT: 64, ptx.TO_HALF: 16, ptx.CONVERT: 16, ptx.SPECIAL: 16, ptx.SHUFFLE: 32,
}  # fmt: skip
AMPERE = {**VOLTA, ptx.FLOAT: 128, ptx.TO_HALF: 64}
HOPPER = {**AMPERE, ptx.HALF: 128}
OLD_PIPES = (FMA, (ptx.HALF, ptx.TO_FLOAT), ALU, (*SLOW, ptx.TO_HALF))
NEW_PIPES = (FMA, (ptx.HALF, ptx.TO_FLOAT), (*ALU, ptx.TO_HALF), SLOW)
# Tensor cores. sm_72: int8, 22 TOPS of AGX Xavier / (2 * 8 * 1.377 GHz); sm_87: 20 dense int8 TOPS of Orin Nano /
# (2 * 8 * 0.625 GHz); sm_90: 1979 of H100 SXM / (2 * 132 * 1.83 GHz). fp16 is half of it on all three.
# `step`: dependent arithmetic, Jia et al., arXiv:1804.06826 (Maxwell 6, Volta 4).
CHIPS = {
    53: Chip(MAXWELL, (CORE, (ptx.TO_FLOAT, ptx.TO_HALF, *SLOW)), {}, 6, 2048, 32, 64 << 10),
    72: Chip(VOLTA, OLD_PIPES, {8: 1024, 16: 512}, 4, 2048, 32, 96 << 10),
    87: Chip(AMPERE, NEW_PIPES, {8: 2048, 16: 1024}, 4, 1536, 16, 164 << 10),
    90: Chip(HOPPER, NEW_PIPES, {8: 4096, 16: 2048}, 4, 2048, 32, 228 << 10),
}  # fmt: skip


@dataclass(frozen=True)
class Busy:
    """A launch: clocks of all multiprocessors together, by what they are busy with.

    issue: one instruction a scheduler and clock; units: the busiest pipe; tensor: tensor cores; memory_pipe: shared
    memory, shuffles, and lines of the first-level cache that loads ask for, `looked_up` a clock. instructions: of
    machine code, executed by warps. chain: those of the longest warp, and `rounds` of waits for global memory.
    """

    issue: float
    units: float
    tensor: float
    turns: float
    lines: float
    instructions: float
    chain: float
    rounds: float

    def clocks(self, lines_a_clock: float) -> float:
        """The largest of the four."""
        return max(self.issue, self.units, self.tensor, self.turns + self.lines / lines_a_clock)


def scale(function: Function, used: Resources) -> float:
    """Machine instructions for one of PTX, by the sizes of both."""
    static = sum(ptx.kind(code.op)[1] for block in function.blocks for code in block.code)
    return float(np.clip(used.instructions / max(1, static), *SCALE))


def busy(done: Executed, factor: float, chip: Chip) -> Busy:
    """What a launch costs on such a chip. factor: see scale()."""
    kinds = done.kinds * factor
    units = max(sum(32 * kinds[kind] / chip.rates[kind] for kind in pipe) for pipe in chip.pipes)
    tensor = sum(macs / chip.macs[bits] for bits, macs in done.macs.items())
    turns = done.banks + done.moved + 32 * kinds[ptx.SHUFFLE] / chip.rates[ptx.SHUFFLE]
    total = float(kinds.sum())
    return Busy(
        total / WARPS_A_CLOCK, float(units), float(tensor), float(turns), max(0.0, done.lines - done.moved), total,
        done.longest * factor, done.rounds,
    )  # fmt: skip


def resident(threads: int, shared: int, used: Resources, chip: Chip) -> int:
    """Blocks that a multiprocessor holds at a time; registers are given out by 8 a thread."""
    registers = -(-max(1, used.registers) // 8) * 8 * (-(-threads // 32) * 32)
    need = used.shared_bytes + shared
    limits = (chip.blocks, chip.threads // threads, chip.registers // registers, chip.shared_bytes // max(1, need))
    return max(1, min(limits))
