// Spans of a row to int8: see quantize.py.
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

// weight: of a norm; order: where PERMUTED, the input of each place.
QUERN_INLINE void rows(const float* x, const float* weight, const int32_t* order, int8_t* q, float* scale,
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
      v[0] = finished(a.x, factor, weight, row, k), v[1] = finished(a.y, factor, weight, row, k + 1);
      v[2] = finished(a.z, factor, weight, row, k + 2), v[3] = finished(a.w, factor, weight, row, k + 3);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (span < SPANS && o + i < SPAN && inside + i < GROUP && k + i < K) {
        const int place = PERMUTED ? load(order + k + i) : k + i;
        v[i] = finished(load_constant(row + place), factor, weight, row, place);
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
