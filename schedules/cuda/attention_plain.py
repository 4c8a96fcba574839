"""Attention over a cache of numbers, a block of threads a head and token, all scores in shared memory.

  quern.attention   arguments and formula: schedules/attention.py
Three passes: scores, their exponentials, the sum of values. It serves caches of every dtype and every shape whose
scores fit into 48 KiB; the faster kernels are asked first.
"""

from __future__ import annotations

from schedules.cuda.elementwise import LOG2_E, literal
from schedules.cuda.embedding import ELEMENTS, widened
from schedules.cuda.kernel import CudaKernel, Launch
from schedules.kernel import NotSuited, Request, spelled

RANK = -1
WARPS = 4
SHARED_BYTES = 48 << 10


def lower(request: Request) -> CudaKernel:
    """One launch; rows beyond span[1] are padding and stay as they are."""
    (m, _), dtype = request.args[0].shape, request.args[1].dtype
    heads, kv_heads, d = (int(request.attrs[key]) for key in ("heads", "kv_heads", "head_dim"))
    capacity, window = request.args[2].shape[1], int(request.attrs["window"])
    scale, cap = float(request.attrs["scale"]), float(request.attrs["softcap"])
    shared = 4 * (capacity + d + WARPS)
    if shared > SHARED_BYTES:
        raise NotSuited
    name = f"attention_plain_{dtype}_m{m}_h{heads}_kv{kv_heads}_d{d}_c{capacity}_w{window}_x{spelled(scale)}"
    name += f"_cap{spelled(cap)}" if cap else ""
    capped = ""
    if cap:
        capped = f"""
    const float tamed = fminf(score * {literal(2 * LOG2_E / cap)}, 126.0f);
    score = {literal(cap)} * (1.0f - 2.0f / (1.0f + exp2_approx(tamed)));"""
    k = widened(dtype, f"k_cache[((int64_t(kv) * {capacity // 16} + p / 16) * {d} + i) * 16 + p % 16]")
    v = widened(dtype, f"v_cache[(int64_t(kv) * {capacity} + p) * {d} + i]")
    block = 32 * WARPS
    source = f"""#include "quern.cuh"
extern "C" __global__ void {name}(const float* q, const {ELEMENTS[dtype]}* k_cache, const {ELEMENTS[dtype]}* v_cache,
    const int32_t* span, float* out) {{
  const int head = blockIdx.x, t = blockIdx.y, kv = head / {heads // kv_heads}, tid = threadIdx.x;
  if (t >= span[1]) return;  // whole blocks
  float* scores = reinterpret_cast<float*>(dynamic_shared());
  float* query = scores + {capacity};
  float* parts = query + {d};
  const int last = span[0] + t, begin = {f"last >= {window} ? last - {window - 1} : 0" if window else "0"};
  for (int i = tid; i < {d}; i += {block}) query[i] = q[(int64_t(t) * {heads} + head) * {d} + i] * {literal(scale)};
  block_sync();
  float largest = -3.0e38f;
  for (int p = begin + tid; p <= last; p += {block}) {{
    float score = 0.0f;
    for (int i = 0; i < {d}; ++i) score = fmaf(query[i], {k}, score);{capped}
    scores[p] = score;
    largest = fmaxf(largest, score);
  }}
  largest = warp_max(largest);
  if (tid % 32 == 0) parts[tid / 32] = largest;
  block_sync();
  for (int w = 0; w < {WARPS}; ++w) largest = fmaxf(largest, parts[w]);
  block_sync();
  float sum = 0.0f;
  for (int p = begin + tid; p <= last; p += {block}) {{
    const float weight = exp2_approx((scores[p] - largest) * {literal(LOG2_E)});
    scores[p] = weight;
    sum += weight;
  }}
  sum = warp_sum(sum);
  if (tid % 32 == 0) parts[tid / 32] = sum;
  block_sync();
  sum = 0.0f;
  for (int w = 0; w < {WARPS}; ++w) sum += parts[w];
  for (int i = tid; i < {d}; i += {block}) {{
    float value = 0.0f;
    for (int p = begin; p <= last; ++p) value = fmaf(scores[p], {v}, value);
    out[(int64_t(t) * {heads} + head) * {d} + i] = value / sum;
  }}
}}
"""
    launch = Launch(name, (heads, m, 1), (block, 1, 1), (0, 1, 2, 3, 4), shared)
    return CudaKernel(name, source, (launch,))


LOWERS = {"quern.attention": lower}
