"""Attention of every common head as ptxas sees it: `python -m tests.schedules.cuda.sweep [TARGET...]`.

What the tests sample is checked here whole: chips, head sizes, caches, query heads a kv head, tokens, windows and caps.
A line for every kernel that spills, then a table of the most registers. Ends with 1 if any does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from itertools import product

from compiler.codegen import nvrtc
from compiler.codegen.nvrtc import Resources
from schedules.cuda.kernel import CudaKernel, lowerings
from schedules.kernel import Request
from targets import Target
from tests.schedules.cuda.kernels import ALL
from tests.schedules.cuda.test_attention import request_of

HEADS = (64, 80, 96, 112, 128, 192, 256)
CACHES = ("float16", "float32", "int8")
# Tokens, and query heads a kv head: of one token they are the rows that share keys, of a prompt they only name rows.
GROUPS = {1: (1, 3, 6, 7, 8), 128: (1, 7)}
VARIANTS: tuple[dict[str, float], ...] = ({}, {"window": 1024, "softcap": 50.0})
CAPACITY, SHARED_MOST = 4096, 48 << 10


@dataclass(frozen=True)
class Case:
    """A call of attention: 4 kv heads, `group` query heads each."""

    target: Target
    cache: str
    m: int
    group: int
    d: int
    variant: int = 0

    @property
    def request(self) -> Request:
        attrs: Mapping[str, float] = VARIANTS[self.variant]
        return request_of(self.target, self.cache, self.m, 4 * self.group, 4, self.d, CAPACITY, attrs)


def cases(target: Target) -> Iterator[Case]:
    """All of a chip; windows and caps, which add little, for some."""
    for (m, groups), cache, d in product(GROUPS.items(), CACHES, HEADS):
        for group in groups:
            yield Case(target, cache, m, group, d)
        if d in (64, 128, 256):
            yield Case(target, cache, m, groups[-1], d, 1)


def lowered(case: Case) -> CudaKernel:
    """Its kernel, by the default knobs."""
    return lowerings()[case.request.op](case.request)


def resources(kernel: CudaKernel, target: Target) -> Resources:
    """What its largest function needs of what a device runs: machine code, or PTX where the driver compiles."""
    gpu = target.gpu
    assert gpu is not None
    own = nvrtc.machine_code(kernel.source, gpu)[1] if gpu.cubin else nvrtc.compile(kernel.source, gpu).functions
    return Resources(*map(max, zip(*map(astuple, own.values()), strict=True)))


def sweep(target: Target) -> int:
    """Compile, tell, sum up; gives how many were wrong."""
    most: dict[tuple[str, int], int] = {}
    wrong = count = 0
    for case in cases(target):
        kernel = lowered(case)
        used = resources(kernel, target)
        family = kernel.name.split("_")[1]
        count += 1
        most[family, case.d] = max(most.get((family, case.d), 0), used.registers)
        if used.spill_bytes or used.shared_bytes > SHARED_MOST:
            wrong += 1
            print(f"{kernel.name}: {used}", flush=True)
    print(f"{target.name}: {count} kernels, {wrong} spill; most registers:")
    for family in sorted({key[0] for key in most}):
        row = ", ".join(f"{d}: {most[family, d]}" for d in HEADS if (family, d) in most)
        print(f"  {family}: {row}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(sum(sweep(target) for target in ALL if target.name in sys.argv[1:] or len(sys.argv) == 1) > 0)
