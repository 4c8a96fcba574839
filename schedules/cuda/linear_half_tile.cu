// TOKENS x ROWS by half2 multiply-adds, two rows side by side: a thread has EACH tokens x 8 rows, STEP inputs at a time.
// See linear_half_tile.py. Constants as linear_half_shared.cu, TOKENS, ROWS, EACH (4 or 8), ORDER, BLOCKS.

constexpr int WIDE = 8, DOWN = TOKENS / EACH, ACROSS = ROWS / WIDE, THREADS = DOWN * ACROSS;
constexpr int STEP = 32, STEPS = (STORED + STEP - 1) / STEP, CHAIN = 16;  // inputs of a step, and of a sum in fp16
constexpr int PADDED = (M + TOKENS - 1) / TOKENS * TOKENS;                // tokens as rounded
constexpr int PARTS = SPAN < STEP ? 2 : 1;                                // of a step, that have scales of their own
constexpr int PITCH = ROWS + 8;  // halves of an input's weights: 8 row pairs of 4 inputs lie in 32 banks
constexpr int PIECES = TOKENS / 8, COPIES = STEP * PIECES / THREADS;      // 128 bits of activations; a thread's
constexpr int UNITS = ROWS / 2 * BITS / THREADS;                          // words of two rows, a thread's
constexpr int SPANS = STORED / SPAN, ROUND_THREADS = 256, ROUND_TOKENS = 8;
static_assert(COPIES * THREADS == STEP * PIECES && UNITS * THREADS == ROWS / 2 * BITS, "threads share evenly");

// Activations to fp16, a block 8 tokens, a warp each for the largest: rounded f16[STEPS * STEP, PADDED] = x * 2^e by
// places of the weights' inputs, back f32[PADDED] = 2^-e, sums f32[SPANS, PADDED] of what was rounded (for offsets).
extern "C" __global__ void __launch_bounds__(ROUND_THREADS, 1)
KERNEL_round(const float* __restrict__ x, Half* __restrict__ rounded, float* __restrict__ back,
             float* __restrict__ sums) {
  __shared__ float factors[ROUND_TOKENS];
  const int thread = threadIdx.x, first = blockIdx.x * ROUND_TOKENS, own = first + thread / 32;
  float most = 0;
  if (own < M) {
    const float* from = x + int64_t(own) * K;
    if constexpr (K % 4 == 0) {
#pragma unroll 4
      for (int k = thread % 32 * 4; k < K; k += 128) {
        const uint4 y = load_constant(reinterpret_cast<const uint4*>(from + k));
        most = fmaxf(fmaxf(most, fabsf(bits_float(y.x))), fabsf(bits_float(y.y)));
        most = fmaxf(fmaxf(most, fabsf(bits_float(y.z))), fabsf(bits_float(y.w)));
      }
    } else {
      for (int k = thread % 32; k < K; k += 32) most = fmaxf(most, fabsf(load_constant(from + k)));
    }
  }
  float size;
  const float times = to_eight(warp_max(most), size);
  if (thread % 32 == 0) factors[thread / 32] = times, back[own] = size;
  block_sync();
  float by[ROUND_TOKENS];
#pragma unroll
  for (int i = 0; i < ROUND_TOKENS; ++i) by[i] = factors[i];
  for (int p = thread; p < STEPS * STEP; p += ROUND_THREADS) {
    const int k = p < STORED ? input_of(p) : -1;
    float found[ROUND_TOKENS];
#pragma unroll
    for (int i = 0; i < ROUND_TOKENS; ++i)
      found[i] = k >= 0 && first + i < M ? load_constant(x + int64_t(first + i) * K + k) : 0.0f;
    uint32_t pairs[ROUND_TOKENS / 2];
#pragma unroll
    for (int i = 0; i < ROUND_TOKENS; i += 2) pairs[i / 2] = to_half2(found[i] * by[i], found[i + 1] * by[i + 1]).bits;
    *reinterpret_cast<uint4*>(rounded + int64_t(p) * PADDED + first) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
  }
  if constexpr (AFFINE == 1) {
    block_sync();
    for (int s = thread / ROUND_TOKENS; s < SPANS; s += ROUND_THREADS / ROUND_TOKENS) {
      const int token = first + thread % ROUND_TOKENS;
      float sum = 0;
      for (int i = 0; i < SPAN; ++i) sum += to_float(rounded[int64_t(s * SPAN + i) * PADDED + token]);
      sums[s * PADDED + token] = sum;
    }
  }
}

struct Staged {  // a step
  alignas(16) Half activations[STEP * TOKENS];
  alignas(16) Half weights[STEP * PITCH];
  alignas(16) float scale[PARTS][ROWS];
  alignas(16) float least[AFFINE == 1 ? PARTS : 1][ROWS];
};

// Of row `row`, and row + 1 behind it.
QUERN_INLINE int group_at(int row, int place) {
  int group = place / WIDTH;
  if (STEPS * STEP > GROUPS * WIDTH) group = group < GROUPS ? group : GROUPS - 1;  // padding: activations are 0
  return (row / 8 * GROUPS + group) * 8 + row % 8;
}

QUERN_INLINE uint32_t load_two(const uint8_t* p) { return load_constant(reinterpret_cast<const Half*>(p)).bits; }

// A word of a row as pairs of inputs; zeros: of this row and the next, for the first and second 16 inputs.
template <int ROW>
QUERN_INLINE void unpack(uint32_t word, const uint32_t (&zeros)[2], const Half* table, Half2 (&to)[PAIRS]) {
  if constexpr (AFFINE == 2) {
    pairs(word, table, to);
  } else {
    pairs(word, AFFINE == 1 ? zero_of(CENTRE, 0) : zero_of(zeros[0], ROW), to);
    if constexpr (BITS == 4 && PARTS > 1 && AFFINE == 0) {
      Half2 second[PAIRS];
      pairs(word, zero_of(zeros[1], ROW), second);
      to[2] = second[2], to[3] = second[3];
    }
  }
}

// Unit u of the weights: a word of rows `own` and own + 1, whose inputs become rows of shared memory.
QUERN_INLINE void stage_weights(const uint32_t* codes, const uint8_t* zero, const Half* table, int thread, int row,
                                int number, int u, Staged& to) {
  const int word = thread % BITS, two = thread / BITS * 2 + u * (THREADS / BITS * 2);
  const int own = row + two;
  const int place = number * STEP + (BITS == 8 ? word / 4 * 16 : 0);
  uint32_t low = 0, high = 0, zeros[2] = {};
  if (STORED % STEP == 0 || place < STORED) {
    const uint32_t* from = codes + (own * (STORED * BITS / 32) + number * BITS + word);
    low = load_stream(from), high = load_stream(from + STORED * BITS / 32);
  }
  if constexpr (AFFINE == 0) {
    zeros[0] = load_two(zero + group_at(own, place));
    if constexpr (BITS == 4 && PARTS > 1) zeros[1] = load_two(zero + group_at(own, place + CHAIN));
  }
  Half2 first[PAIRS], second[PAIRS];
  unpack<0>(low, zeros, table, first);
  unpack<1>(high, zeros, table, second);
  Half* at = to.weights + (BITS == 8 ? word / 4 * 16 : 0) * PITCH + word % 4 * 2 * PITCH + two;
#pragma unroll
  for (int j = 0; j < PAIRS; ++j) {  // inputs 8 j + 2 t and the next
    *reinterpret_cast<uint32_t*>(at + 8 * j * PITCH) = permute_bytes(first[j].bits, second[j].bits, 0x5410u);
    *reinterpret_cast<uint32_t*>(at + (8 * j + 1) * PITCH) = permute_bytes(first[j].bits, second[j].bits, 0x7632u);
  }
}

QUERN_INLINE void stage_scales(const Scale* scale, const float* offset, int thread, int row, int number,
                               Staged& to) {
#pragma unroll
  for (int i = thread; i < PARTS * ROWS / 2; i += THREADS) {
    const int p = i / (ROWS / 2), own = i % (ROWS / 2) * 2;
    const int at = group_at(row + own, number * STEP + p * CHAIN);
    const float2 two = two_scales(scale + at);
    *reinterpret_cast<float2*>(&to.scale[p][own]) = two;
    if constexpr (AFFINE == 1) {
      const float2 base = two_scales(offset + at);
      to.least[p][own] = fmaf(two.x, static_cast<float>(CENTRE), base.x);
      to.least[p][own + 1] = fmaf(two.y, static_cast<float>(CENTRE), base.y);
    }
  }
}

// sums += CHAIN inputs, from input k of the step on.
QUERN_INLINE void multiply(const Half* left, const Half* right, int k, Half2 (&sums)[EACH][WIDE / 2]) {
#pragma unroll
  for (int i = 0; i < CHAIN; ++i) {
    uint32_t tokens[EACH / 2];
    if constexpr (EACH == 8) {
      const uint4 x = *reinterpret_cast<const uint4*>(left + (k + i) * TOKENS);
      tokens[0] = x.x, tokens[1] = x.y, tokens[EACH - 6] = x.z, tokens[EACH - 5] = x.w;
    } else {
      const uint2 x = *reinterpret_cast<const uint2*>(left + (k + i) * TOKENS);
      tokens[0] = x.x, tokens[1] = x.y;
    }
    const uint4 y = *reinterpret_cast<const uint4*>(right + (k + i) * PITCH);
    const uint32_t rows[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int t = 0; t < EACH; ++t) {
      const Half2 token = t % 2 ? high_twice(Half2{tokens[t / 2]}) : low_twice(Half2{tokens[t / 2]});
#pragma unroll
      for (int r = 0; r < WIDE / 2; ++r)
        sums[t][r] = i == 0 ? mul_half2(token, Half2{rows[r]}) : fma_half2(token, Half2{rows[r]}, sums[t][r]);
    }
  }
}

QUERN_INLINE void read_eight(const float* p, float (&to)[WIDE]) {
#pragma unroll
  for (int i = 0; i < WIDE; i += 4) {
    const uint4 x = *reinterpret_cast<const uint4*>(p + i);
    to[i] = bits_float(x.x), to[i + 1] = bits_float(x.y), to[i + 2] = bits_float(x.z), to[i + 3] = bits_float(x.w);
  }
}

// totals += scale * sums
QUERN_INLINE void scale_sums(const Half2 (&sums)[EACH][WIDE / 2], const float* scale, float (&totals)[EACH][WIDE]) {
  float factors[WIDE];
  read_eight(scale, factors);
#pragma unroll
  for (int t = 0; t < EACH; ++t)
#pragma unroll
    for (int r = 0; r < WIDE; r += 2) {
      const float2 two = to_float2(sums[t][r / 2]);
      totals[t][r] = fmaf(two.x, factors[r], totals[t][r]);
      totals[t][r + 1] = fmaf(two.y, factors[r + 1], totals[t][r + 1]);
    }
}

QUERN_INLINE void run(const Half* rounded, const float* back, const float* sums, const uint32_t* codes,
                      const Scale* scale, const uint8_t* zero, const float* offset, const float* residual, float* out) {
  __shared__ Staged staged;
  __shared__ Half table[16];
  const int thread = threadIdx.x;
  const int token = (ORDER ? blockIdx.x : blockIdx.y) * TOKENS, row = (ORDER ? blockIdx.y : blockIdx.x) * ROWS;
  fill_table(table);
  float totals[EACH][WIDE] = {};
  const int end = opaque(STEPS);
#pragma unroll 1
  for (int next = 0; next < end; ++next) {
    // Of several units a thread, addresses kept from step to step would spill.
    const int number = UNITS > 1 ? opaque(next) : next, mine = UNITS > 1 ? opaque(thread) : thread;
    uint4 activations[COPIES];
    const Half* from = rounded + ((number * STEP + mine / PIECES) * PADDED + token + mine % PIECES * 8);
#pragma unroll
    for (int c = 0; c < COPIES; ++c)
      activations[c] = load_constant(reinterpret_cast<const uint4*>(from + c * (THREADS / PIECES) * PADDED));
    block_sync();
#pragma unroll
    for (int u = 0; u < UNITS; ++u) stage_weights(codes, zero, table, mine, row, number, u, staged);
    stage_scales(scale, offset, mine, row, number, staged);
#pragma unroll
    for (int c = 0; c < COPIES; ++c)
      *reinterpret_cast<uint4*>(staged.activations + (mine + c * THREADS) * 8) = activations[c];
    block_sync();
    const int own_token = mine / ACROSS * EACH, own_row = mine % ACROSS * WIDE;
    const Half* left = staged.activations + own_token;
    const Half* right = staged.weights + own_row;
    Half2 first[EACH][WIDE / 2], second[EACH][WIDE / 2];
    multiply(left, right, 0, first);
    if constexpr (PARTS > 1) {
      scale_sums(first, &staged.scale[0][own_row], totals);
      multiply(left, right, CHAIN, second);
      scale_sums(second, &staged.scale[PARTS - 1][own_row], totals);
    } else {
      multiply(left, right, CHAIN, second);
#pragma unroll
      for (int t = 0; t < EACH; ++t)
#pragma unroll
        for (int r = 0; r < WIDE / 2; ++r) first[t][r] = add_half2(first[t][r], second[t][r]);
      scale_sums(first, &staged.scale[0][own_row], totals);
    }
    if constexpr (AFFINE == 1) {
#pragma unroll
      for (int p = 0; p < PARTS; ++p) {
        const int place = number * STEP + p * CHAIN;
        if ((SPAN > STEP && place % SPAN != 0) || place >= STORED) continue;
        float least[WIDE];
        read_eight(&staged.least[p][own_row], least);
#pragma unroll
        for (int t = 0; t < EACH; ++t) {
          const float sum = load_constant(sums + place / SPAN * PADDED + token + own_token + t);
#pragma unroll
          for (int r = 0; r < WIDE; ++r) totals[t][r] = fmaf(sum, least[r], totals[t][r]);
        }
      }
    }
  }
  const int again = opaque(thread);  // found anew: registers are short in the loop
#pragma unroll
  for (int t = 0; t < EACH; ++t) {
    const int of = token + again / ACROSS * EACH + t;
    if (of >= M) continue;
    const float size = load_constant(back + of);
#pragma unroll
    for (int r = 0; r < WIDE; ++r) {
      const int n = row + again % ACROSS * WIDE + r;
      const int64_t at = int64_t(of) * N + n;
      if (n < N) out[at] = RESIDUAL ? fmaf(totals[t][r], size, residual[at]) : totals[t][r] * size;
    }
  }
}
