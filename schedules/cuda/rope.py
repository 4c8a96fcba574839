"""Rotation of q and k, and the append of k and v to the cache: what schedules/rope.py computes, in its layout.

  quern.rope_append[_norm][_int8]
A warp a head and token. q and k of a head are rotated by its lanes; with a norm over all heads (weights wider than
head_dim) each warp adds up the squares of all of them: at a few KiB they come out of the cache.
"""

from __future__ import annotations

from schedules.cuda.elementwise import literal
from schedules.cuda.embedding import ELEMENTS
from schedules.cuda.kernel import CudaKernel, Launch, block_size
from schedules.kernel import Request, Space, TensorSpec, spelled
from schedules.quantize import SMALLEST

WARPS, TRIED = 4, (1, 2, 4, 8)  # of a block: heads of one token


def _norms(specs: tuple[TensorSpec, ...], heads: int, kv_heads: int, d: int, eps: float) -> str:
    """C++ that finds `factor` and `weight` of the head at hand, both 1 where there is no norm."""
    if not specs:
        return ""
    each = [spec.shape[0] == d for spec in specs]
    first = [f"head * {d}" if e else "0" for e in (each[0],)] + [f"head * {d}" if each[1] else f"{heads * d}"]
    count = [d if each[0] else heads * d, d if each[1] else kv_heads * d]
    offset = ["0" if each[0] else f"head * {d}", "0" if each[1] else f"(head - {heads}) * {d}"]
    return f"""
  if (head < {heads + kv_heads}) {{
    const bool query = head < {heads};
    const float* from = row + (query ? {first[0]} : {first[1]});
    const int count = query ? {count[0]} : {count[1]};
    weight = query ? q_norm + {offset[0]} : k_norm + {offset[1]};
    float sum = 0.0f;
    for (int i = lane; i < count; i += 32) sum = fmaf(from[i], from[i], sum);
    sum = warp_sum(sum);
    factor = 1.0f / sqrtf(sum / float(count) + {literal(eps)});
  }}"""


def _append(kind: str, heads: int, kv_heads: int, d: int, capacity: int, value_row: int) -> str:
    """C++ that puts this warp's key or value, element by element `mine(i)`, into its cache."""
    if kind != "int8":
        cast = "to_half" if kind == "float16" else ""
        return f"""
  for (int i = lane; i < {d}; i += 32) {{
    const auto stored = {cast}(mine(i));
    if (key) k_cache[((int64_t(kv) * {capacity // 16} + position / 16) * {d} + i) * 16 + position % 16] = stored;
    else v_cache[(int64_t(kv) * {capacity} + position) * {d} + i] = stored;
  }}"""
    return f"""
  float largest = 0.0f;
  for (int i = lane; i < {d}; i += 32) largest = fmaxf(largest, fabsf(mine(i)));
  largest = warp_max(largest);
  const bool some = largest >= {literal(SMALLEST)};
  const float inverse = some ? 127.0f / largest : 0.0f;
  if (lane == 0) (key ? k_scale : v_scale)[kv * {capacity} + position] = some ? largest / 127.0f : 0.0f;
  const int64_t block = int64_t(kv) * {capacity // 16} + position / 16;
  const int64_t pair = int64_t(kv) * {capacity // 2} + position / 2;
  for (int i = lane; i < {d}; i += 32) {{
    const int8_t code = int8_t(round_to_int(mine(i) * inverse));
    if (key) k_cache[(block * {d // 2} + i / 2) * 32 + position % 16 * 2 + i % 2] = code;
    else v_cache[pair * {value_row} + 2 * i + position % 2] = code;
  }}"""


def lower(request: Request) -> CudaKernel:
    """One launch; rows beyond span[1] are padding and do nothing."""
    qkv, rope, _, *others = request.args
    norms, caches = (tuple(others[:2]), others[2:]) if "_norm" in request.op else ((), others)
    heads, kv_heads, d = (int(request.attrs[key]) for key in ("heads", "kv_heads", "head_dim"))
    (m, columns), kind = qkv.shape, caches[0].dtype
    capacity, eps = caches[2 if kind == "int8" else 1].shape[1], float(request.attrs.get("eps", 0.0))
    name = f"rope_append_{kind}_m{m}_h{heads}_kv{kv_heads}_d{d}_p{rope.shape[0]}_c{capacity}"
    if norms:
        name += f"_norm{norms[0].shape[0]}_{norms[1].shape[0]}_eps{spelled(eps)}"
    element = ELEMENTS.get(kind, "int8_t")
    arguments = ["const float* qkv", "const float* rope", "const int32_t* span"]
    arguments += ["const float* q_norm", "const float* k_norm"] if norms else []
    arguments += [f"{element}* k_cache", f"{element}* v_cache"]
    arguments += ["float* k_scale", "float* v_scale"] if kind == "int8" else []
    warps = request.knobs.get("warps", WARPS)
    name += f"_w{warps}"
    all_heads, normed = heads + 2 * kv_heads, " * factor * weight[{}]" if norms else ""
    source = f"""#include "quern.cuh"
extern "C" __global__ void {name}({", ".join(arguments)}, float* out) {{
  const int lane = threadIdx.x % 32, head = blockIdx.x * {warps} + threadIdx.x / 32, t = blockIdx.y;
  if (head >= {all_heads} || t >= span[1]) return;  // whole warps
  const int position = span[0] + t;
  const float* row = qkv + int64_t(t) * {columns};
  const float* own = row + head * {d};
  const float* angles = rope + int64_t(position) * {d};
  float factor = 1.0f;
  const float* weight = nullptr;{_norms(norms, heads, kv_heads, d, eps)}
  const bool key = head < {heads + kv_heads};
  auto mine = [&](int i) {{  // element i of this head, normed and rotated; values as they are
    if (!key) return own[i];
    const int low = i % {d // 2};
    const float first = own[low]{normed.format("low")};
    const float second = own[low + {d // 2}]{normed.format(f"low + {d // 2}")};
    const float cosine = angles[low], sine = angles[{d // 2} + low];
    return i < {d // 2} ? first * cosine - second * sine : second * cosine + first * sine;
  }};
  if (head < {heads}) {{
    for (int i = lane; i < {d}; i += 32) out[(int64_t(t) * {heads} + head) * {d} + i] = mine(i);
    return;
  }}
  const int kv = key ? head - {heads} : head - {heads + kv_heads};{
        _append(kind, heads, kv_heads, d, capacity, caches[1].shape[2])
    }
}}
"""
    grid = (-(-all_heads // warps), m, 1)
    launch = Launch(name, grid, (32 * warps, 1, 1), tuple(range(len(request.args) + 1)))
    return CudaKernel(name, source, (launch,))


LOWERS = {f"quern.rope_append{norm}{kind}": lower for norm in ("", "_norm") for kind in ("", "_int8")}


def space(request: Request) -> Space:
    """Warps of a block."""
    heads, kv_heads, d = (int(request.attrs[key]) for key in ("heads", "kv_heads", "head_dim"))
    m, cache = request.args[0].shape[0], request.args[-4 if request.op.endswith("_int8") else -2].dtype
    return block_size(request, "warps", WARPS, TRIED, m=m, heads=heads, kv_heads=kv_heads, head_dim=d, cache=cache)


SPACES = dict.fromkeys(LOWERS, space)
