// One token: a block has ROWS rows (a multiple of 8), its threads have the chunks of 128 bits of a row between them.
// See linear_half.py. Constants as linear_half_shared.cu, ROWS, THREADS.

constexpr int WARPS = THREADS / 32, CHUNKS = STORED / CHUNK;
constexpr int GROUPS_OF_CHUNK = CHUNK > WIDTH ? CHUNK / WIDTH : 1;

// The activations of a chunk as halves, `back` times too large, and their sums by 16 inputs in their own size.
QUERN_INLINE void load_activations(const float* x, int chunk, Half2 (&to)[CHUNK / 2], float& back,
                                   float (&sums)[HALVES]) {
  float values[CHUNK], most = 0;
#pragma unroll
  for (int i = 0; i < CHUNK; i += 4) {
    if constexpr (DENSE) {
      const uint4 y = load_constant(reinterpret_cast<const uint4*>(x + chunk * CHUNK + i));
      values[i] = bits_float(y.x), values[i + 1] = bits_float(y.y);
      values[i + 2] = bits_float(y.z), values[i + 3] = bits_float(y.w);
    } else {
#pragma unroll
      for (int j = i; j < i + 4; ++j) {
        const int k = input_of(chunk * CHUNK + j);
        values[j] = k < 0 ? 0.0f : load_constant(x + k);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) most = fmaxf(most, fabsf(values[i]));
  const float times = to_eight(most, back);
#pragma unroll
  for (int h = 0; h < HALVES; ++h) sums[h] = 0;
#pragma unroll
  for (int i = 0; i < CHUNK; i += 2) {
    to[i / 2] = to_half2(values[i] * times, values[i + 1] * times);
    if constexpr (AFFINE == 1) {
      const float2 rounded = to_float2(to[i / 2]);
      sums[i / 16] = fmaf(rounded.x + rounded.y, back, sums[i / 16]);
    }
  }
}

// Eight neighbouring scales, zeros or offsets.
QUERN_INLINE void load_eight(const Half* p, float (&to)[8]) {
  const uint4 x = load_constant(reinterpret_cast<const uint4*>(p));
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 y = to_float2(Half2{words[i]});
    to[2 * i] = y.x, to[2 * i + 1] = y.y;
  }
}
QUERN_INLINE void load_eight(const float* p, float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 x = load_constant(reinterpret_cast<const uint4*>(p) + i);
    to[4 * i] = bits_float(x.x), to[4 * i + 1] = bits_float(x.y);
    to[4 * i + 2] = bits_float(x.z), to[4 * i + 3] = bits_float(x.w);
  }
}

// A tree of exchanges that sums rows over lanes; 32 / ROWS neighbouring lanes end with parts of one row. Returns which.
template <int LEFT>
QUERN_INLINE int hand_out(float (&sums)[ROWS], int lane) {
  if constexpr (LEFT == 0) {
    return 0;
  } else {
    constexpr int mask = LEFT * 32 / ROWS;
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < LEFT; ++i) {
      const float given = upper ? sums[i] : sums[i + LEFT];
      sums[i] = (upper ? sums[i + LEFT] : sums[i]) + shuffle_xor(given, mask);
    }
    return (upper ? LEFT : 0) + hand_out<LEFT / 2>(sums, lane);
  }
}

QUERN_INLINE void run(const float* x, const uint32_t* codes, const Scale* scale, const uint8_t* zero,
                      const float* offset, const float* residual, float* out) {
  __shared__ Half table[16];
  __shared__ float gathered[WARPS][ROWS];
  const int thread = threadIdx.x, lane = thread % 32, row = blockIdx.x * ROWS;
  fill_table(table);
  if constexpr (AFFINE == 2) block_sync();
  float sums[ROWS] = {};
  const int end = opaque(CHUNKS);
#pragma unroll 1
  for (int chunk = thread; chunk < end; chunk += THREADS) {
    Half2 activations[CHUNK / 2];
    float back, by_half[HALVES];
    load_activations(x, chunk, activations, back, by_half);
#pragma unroll
    for (int eight = 0; eight < ROWS; eight += 8) {
      uint4 words[8];
#pragma unroll
      for (int r = 0; r < 8; ++r)
        words[r] = load_stream(reinterpret_cast<const uint4*>(codes) + int64_t(row + eight + r) * CHUNKS + chunk);
#pragma unroll
      for (int part = 0; part < GROUPS_OF_CHUNK; ++part) {  // two where 32 inputs have two scales
        int group = chunk * CHUNK / WIDTH + part;
        if (GROUPS_OF_CHUNK > 1 && group >= GROUPS) group = GROUPS - 1;  // padding, whose activations are 0
        const int64_t place = (int64_t((row + eight) / 8) * GROUPS + group) * 8;
        float scales[8], offsets[8];
        load_eight(scale + place, scales);
        uint2 zeros = uint2{0, 0};
        if constexpr (AFFINE == 0) zeros = load_constant(reinterpret_cast<const uint2*>(zero + place));
        if constexpr (AFFINE == 1) load_eight(offset + place, offsets);
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          const uint32_t four[4] = {words[r].x, words[r].y, words[r].z, words[r].w};
          Half2 sum[HALVES];
          const Zero own = AFFINE == 1 ? zero_of(CENTRE, 0) : zero_of(r < 4 ? zeros.x : zeros.y, r % 4);
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            Half2 weights[PAIRS];
            if constexpr (AFFINE == 2) {
              pairs(four[t], table, weights);
            } else {
              pairs(four[t], own, weights);
            }
#pragma unroll
            for (int j = 0; j < PAIRS; ++j) {
              if (GROUPS_OF_CHUNK > 1 && j / 2 != part) continue;
              const Half2 activation = activations[j / 2 * 8 + j % 2 * 4 + t];
              Half2& to = sum[j / 2];
              to = t == 0 && j % 2 == 0 ? mul_half2(weights[j], activation) : fma_half2(weights[j], activation, to);
            }
          }
          const Half2 both = HALVES > 1 && GROUPS_OF_CHUNK == 1 ? add_half2(sum[0], sum[HALVES - 1])
                                                                : sum[GROUPS_OF_CHUNK > 1 ? part : 0];
          const float2 two = to_float2(both);
          float& total = sums[eight + r];
          total = fmaf(two.x + two.y, scales[r] * back, total);
          if constexpr (AFFINE == 1) {
            const float least = fmaf(scales[r], static_cast<float>(CENTRE), offsets[r]);
            if constexpr (GROUPS_OF_CHUNK > 1) {
              total = fmaf(least, by_half[part], total);
            } else {
              total = fmaf(least, HALVES > 1 ? by_half[0] + by_half[HALVES - 1] : by_half[0], total);
            }
          }
        }
      }
    }
  }
  const int own = hand_out<ROWS / 2>(sums, lane);
#pragma unroll
  for (int mask = 16 / ROWS; mask > 0; mask /= 2) sums[0] += shuffle_xor(sums[0], mask);
  if (lane % (32 / ROWS) == 0) gathered[thread / 32][own] = sums[0];
  block_sync();
  if (thread < ROWS && row + thread < N) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += gathered[w][thread];
    if constexpr (RESIDUAL) sum += residual[row + thread];
    out[row + thread] = sum;
  }
}
