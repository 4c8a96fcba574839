"""fp32 activations to int8 on CUDA, alone or behind a norm or a gated activation.

  quern.quantize[_permuted], quern.rms_norm_quantize[_permuted], quern.swiglu_quantize[_permuted] and
  quern.geglu_quantize[_permuted]: arguments, results and formulas as in schedules.quantize, .rms_norm, .swiglu, .geglu.

Some lanes of a warp, a power of two, own a span, four inputs each: its largest value and its sum take a few shuffles, and
its codes leave as whole words. A block has WARPS warps with neighbouring spans of one token. A norm's sum of squares is
found by every block anew: 16 KB from the second-level cache are quicker than a second launch. It adds up in 4 * THREADS
sums, then as a tree: the error grows with d / (4 * THREADS), not with d. Quantisation itself gives the CPU's bits; 2^x is
the CPU's polynomial in its order (schedules.vector.exp2), fused where the CPU may fuse.
Bytes: 4 in (8 behind a gate) and 1.06 out for an input, in decoding all from and to caches: launching it costs more.
"""

from __future__ import annotations

from math import pi, sqrt

from schedules import vector
from schedules.cuda.kernel import CudaKernel, Launch
from schedules.geglu import CUBIC
from schedules.geometry import Geometry
from schedules.kernel import Request, spelled
from schedules.quantize import SMALLEST

WARPS = 8
OF_LANE = 4  # inputs

# 2^x for x <= 127 as schedules.vector.exp2 has it, and the gated activations. Constants come in front.
ACTIVATIONS = r"""
QUERN_INLINE float exp2_polynomial(float x) {
  x = fmaxf(x, -127.0f);
  const int32_t whole = round_to_int(x);
  const float f = x - static_cast<float>(whole);
  float power = EXP2_0;
  power = fmaf(power, f, EXP2_1);
  power = fmaf(power, f, EXP2_2);
  power = fmaf(power, f, EXP2_3);
  power = fmaf(power, f, EXP2_4);
  power = fmaf(power, f, 1.0f);
  return bits_float(float_bits(power) + (static_cast<uint32_t>(whole) << 23));
}
QUERN_INLINE float sigmoid_times(float gate, float exponent) {  // gate / (1 + 2^exponent)
  return gate / (1.0f + exp2_polynomial(fminf(exponent, 127.0f)));
}
QUERN_INLINE float silu(float gate) { return sigmoid_times(gate, gate * -LOG2_E); }
QUERN_INLINE float gelu_tanh(float gate) {
  return sigmoid_times(gate, gate * fmaf(gate * gate, GELU_CUBED, GELU_FACTOR));
}
"""
BODY = r"""
constexpr int THREADS = WARPS * 32, SPANS_IN_WARP = 32 / SPAN_LANES;
QUERN_INLINE float4 load4(const float* p) {
  uint4 v = load_constant(reinterpret_cast<const uint4*>(p));
  return float4{bits_float(v.x), bits_float(v.y), bits_float(v.z), bits_float(v.w)};
}
// 1 / sqrt(mean of squares + eps) of a row, for all threads of the block.
QUERN_INLINE float inverse_rms(const float* row) {
  __shared__ float sums[WARPS];
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  if (VECTOR) {
    for (int i = 4 * threadIdx.x; i < K; i += 4 * THREADS) {
      float4 v = load4(row + i);
      sum.x = fmaf(v.x, v.x, sum.x), sum.y = fmaf(v.y, v.y, sum.y);
      sum.z = fmaf(v.z, v.z, sum.z), sum.w = fmaf(v.w, v.w, sum.w);
    }
  } else {
    for (int i = threadIdx.x; i < K; i += THREADS) {
      float v = load_constant(row + i);
      sum.x = fmaf(v, v, sum.x);
    }
  }
  float all = warp_sum((sum.x + sum.y) + (sum.z + sum.w));
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = all;
  block_sync();
  all = 0.0f;
  for (int w = 0; w < WARPS; ++w) all += sums[w];
  return 1.0f / sqrtf(all / static_cast<float>(K) + EPS);
}
QUERN_INLINE float finished(float x, float factor, const float* weight, const float* row, int place) {
  if (KIND == 1) return x * factor * load_constant(weight + place);
  if (KIND == 2) return silu(x) * load_constant(row + K + place);
  if (KIND == 3) return gelu_tanh(x) * load_constant(row + K + place);
  return x;
}

extern "C" __global__ void __launch_bounds__(THREADS) @NAME@(const float* x, @PARAMETERS@int8_t* q, float* scale,
                                                             int32_t* sum) {
  const int lane = threadIdx.x % 32, of_span = lane % SPAN_LANES, token = blockIdx.y;
  const int span = (blockIdx.x * WARPS + threadIdx.x / 32) * SPANS_IN_WARP + lane / SPAN_LANES;
  const float* row = x + static_cast<int64_t>(token) * COLUMNS;
  const float factor = KIND == 1 ? inverse_rms(row) : 0.0f;
  // Of the span, of its weight group, of the row: see schedules.geometry.
  const int o = 4 * of_span, inside = span % PARTS * SPAN + o, k = span / PARTS * GROUP + inside;
  float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (VECTOR && !PERMUTED) {
    if (span < SPANS && o < SPAN && inside < GROUP && k < K) {
      const float4 a = load4(row + k);
      v[0] = finished(a.x, factor, @WEIGHT@, row, k), v[1] = finished(a.y, factor, @WEIGHT@, row, k + 1);
      v[2] = finished(a.z, factor, @WEIGHT@, row, k + 2), v[3] = finished(a.w, factor, @WEIGHT@, row, k + 3);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (span < SPANS && o + i < SPAN && inside + i < GROUP && k + i < K) {
        const int place = @PLACE@;
        v[i] = finished(load_constant(row + place), factor, @WEIGHT@, row, place);
      }
  }
  const float amax = warp_max<SPAN_LANES>(fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3]))));
  const bool some = amax >= SMALLEST;
  const float inverse = some ? 127.0f / amax : 0.0f;
  uint32_t word = 0;
  int32_t total = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int32_t code = round_to_int(v[i] * inverse);
    word |= (static_cast<uint32_t>(code) & 255u) << 8 * i;
    total += code;
  }
  total = warp_sum<SPAN_LANES>(total);
  const int64_t at = static_cast<int64_t>(token) * SPANS + span;
  if (span < SPANS && o < WIDTH) store(reinterpret_cast<uint32_t*>(q + at * WIDTH + o), word);
  if (span < SPANS && of_span == 0) {
    scale[at] = some ? amax / 127.0f : 0.0f;
    sum[at] = total;
  }
}
"""
KINDS = {"quantize": 0, "rms_norm_quantize": 1, "swiglu_quantize": 2, "geglu_quantize": 3}


def activations() -> str:
    """The text of `silu` and `gelu_tanh`, which multiply a gate with its sigmoid."""
    factor = -2 * sqrt(2 / pi) * vector.LOG2_E
    values = {f"EXP2_{i}": value for i, value in enumerate(vector.EXP2)}
    values |= {"LOG2_E": vector.LOG2_E, "GELU_FACTOR": factor, "GELU_CUBED": factor * CUBIC}
    return "".join(f"constexpr float {name} = {value!r}f;\n" for name, value in values.items()) + ACTIVATIONS


def lower(request: Request) -> CudaKernel:
    """A block of warps for neighbouring spans of a token."""
    assert request.target.gpu is not None
    permuted = request.op.endswith("_permuted")
    kind = KINDS[request.op.removeprefix("quern.").removesuffix("_permuted")]
    m, columns = request.args[0].shape
    k, group = columns // 2 if kind >= 2 else columns, int(request.attrs["group"])
    geometry = Geometry(k, group)
    lanes = 1 << max(0, (geometry.width // OF_LANE - 1).bit_length())
    eps = float(request.attrs.get("eps", 0.0))
    sizes = {
        "K": k, "COLUMNS": columns, "GROUP": group, "PARTS": geometry.parts, "SPAN": geometry.span, "KIND": kind,
        "WIDTH": geometry.width, "SPANS": geometry.spans, "SPAN_LANES": lanes, "WARPS": WARPS, "PERMUTED": permuted,
        "VECTOR": all(value % OF_LANE == 0 for value in (k, group, geometry.span)),
    }  # fmt: skip
    name = f"{request.op.removeprefix('quern.')}_{request.target.gpu.arch}_m{m}_k{k}_g{group}"
    name += f"_eps{spelled(eps)}" if kind == 1 else ""
    body = BODY
    for key, text in {
        "NAME": name,
        "PARAMETERS": ("const float* weight, " if kind == 1 else "") + ("const int32_t* order, " if permuted else ""),
        "WEIGHT": "weight" if kind == 1 else "nullptr",
        "PLACE": "load(order + k + i)" if permuted else "k + i",
    }.items():
        body = body.replace(f"@{key}@", text)
    constants = "".join(f"constexpr int {key} = {int(value)};\n" for key, value in sizes.items())
    constants += f"constexpr float EPS = {eps!r}f, SMALLEST = {SMALLEST!r}f;\n"
    grid = (-(-geometry.spans // (WARPS * (32 // lanes))), m, 1)
    launch = Launch(name, grid, (WARPS * 32, 1, 1), tuple(range(len(request.args) + 3)))
    return CudaKernel(name, f'#include "quern.cuh"\n{constants}{activations()}{body}', (launch,))


LOWERS = {f"quern.{op}{tail}": lower for op in KINDS for tail in ("", "_permuted")}
