"""The span of a prompt's last real row: quern.last_span of schedules/last_row.py."""

from __future__ import annotations

from schedules.cuda.kernel import CudaKernel, Launch
from schedules.kernel import Request


def lower(request: Request) -> CudaKernel:
    """One warp, of which one thread works."""
    source = """#include "quern.cuh"
extern "C" __global__ void last_span(const int32_t* span, int32_t* out) {
  if (threadIdx.x == 0) {
    out[0] = span[0] + span[1] - 1;
    out[1] = 1;
  }
}
"""
    return CudaKernel("last_span", source, (Launch("last_span", (1, 1, 1), (32, 1, 1), (0, 1)),))


LOWERS = {"quern.last_span": lower}
