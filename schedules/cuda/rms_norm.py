"""RMS norm, a block of threads a token: what schedules/rms_norm.py computes, with the squares summed in another order.

  quern.rms_norm  x f32[m, d], weight f32[d]; eps -> f32[m, d]
The squares add up in a block's threads, d / threads each, then as a tree.
"""

from __future__ import annotations

from schedules.cuda.elementwise import literal
from schedules.cuda.kernel import CudaKernel, Launch, block_size
from schedules.kernel import Request, Space, spelled

BLOCK = 256  # threads, the default
BLOCKS = (128, 256, 512, 1024)


def lower(request: Request) -> CudaKernel:
    """One launch."""
    (m, d), eps = request.args[0].shape, float(request.attrs["eps"])
    block = request.knobs.get("threads", BLOCK)
    name = f"rms_norm_m{m}_d{d}_eps{spelled(eps)}_t{block}"
    source = f"""#include "quern.cuh"
extern "C" __global__ void __launch_bounds__({block}) {name}(const float* x, const float* weight, float* out) {{
  __shared__ float parts[{block // 32}];
  const float* row = x + int64_t(blockIdx.x) * {d};
  float sum = 0.0f;
  for (int c = threadIdx.x; c < {d}; c += {block}) {{
    const float value = load_constant(row + c);
    sum = fmaf(value, value, sum);
  }}
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  block_sync();
  sum = 0.0f;
  for (int i = 0; i < {block // 32}; ++i) sum += parts[i];
  const float factor = 1.0f / sqrtf(sum / {d}.0f + {literal(eps)});
  for (int c = threadIdx.x; c < {d}; c += {block})
    out[int64_t(blockIdx.x) * {d} + c] = load_constant(row + c) * factor * load_constant(weight + c);
}}
"""
    return CudaKernel(name, source, (Launch(name, (m, 1, 1), (block, 1, 1), (0, 1, 2)),))


LOWERS = {"quern.rms_norm": lower}


def space(request: Request) -> Space:
    """Threads of a block, of which a token has one."""
    m, d = request.args[0].shape
    return block_size(request, "threads", BLOCK, BLOCKS, m=m, d=d)


SPACES = dict.fromkeys(LOWERS, space)
