// TOKENS x ROWS by wmma (sm_70 and 72). Warps side by side, or in two rows. Constants as linear_half_stage.cu.

QUERN_INLINE void run(const Half* rounded, const float* back, const float* sums, const uint32_t* codes,
                      const Scale* scale, const uint8_t* zero, const float* offset, const float* residual, float* out) {
  constexpr int DOWN = TOKENS >= 32 ? 2 : 1, ACROSS = WARPS / DOWN;
  constexpr int TALL = TOKENS / 16 / DOWN, WIDE = ROWS / 16 / ACROSS;
  alignas(32) __shared__ Half activations[TOKENS * PITCH];
  alignas(32) __shared__ Half weights[ROWS * PITCH];
  alignas(32) __shared__ float places[16 * 16];
  __shared__ float scales[PARTS][ROWS], leasts[PARTS][ROWS];
  __shared__ Half table[16];
  const int thread = threadIdx.x, warp = thread / 32, token = (ORDER ? blockIdx.x : blockIdx.y) * TOKENS, row = (ORDER ? blockIdx.y : blockIdx.x) * ROWS;
  const int own_token = warp / ACROSS * TALL * 16, own_row = warp % ACROSS * WIDE * 16;
  fill_table(table);
  for (int i = thread; i < 256; i += THREADS) places[i] = static_cast<float>(i);
  block_sync();
  float numbers[8];
  wmma_load_c(numbers, places, 16);  // 16 token + row, of what this lane holds of a fragment
  float totals[TALL][WIDE][8] = {};
  Ahead ahead;
  read_ahead(rounded, codes, scale, zero, offset, token, row, 0, ahead);
  const int end = opaque(STORED);
#pragma unroll 1
  for (int step = 0; step < end; step += STEP) {
    block_sync();
    put(ahead, table, activations, weights, scales, leasts);
    block_sync();
    if (step + STEP < STORED) read_ahead(rounded, codes, scale, zero, offset, token, row, step + STEP, ahead);
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
      float part[TALL][WIDE][8] = {};
#pragma unroll
      for (int k = 0; k < PART; k += 16) {
        uint32_t left[TALL][8], right[WIDE][8];
#pragma unroll
        for (int i = 0; i < TALL; ++i)
          wmma_load_a(left[i], activations + (own_token + i * 16) * PITCH + p * PART + k, PITCH);
#pragma unroll
        for (int j = 0; j < WIDE; ++j)
          wmma_load_b(right[j], weights + (own_row + j * 16) * PITCH + p * PART + k, PITCH);
#pragma unroll
        for (int i = 0; i < TALL; ++i)
#pragma unroll
          for (int j = 0; j < WIDE; ++j) wmma_multiply(part[i][j], left[i], right[j]);
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int number = round_to_int(numbers[e]);
#pragma unroll
        for (int j = 0; j < WIDE; ++j) {
          const float times = scales[p][own_row + j * 16 + number % 16];
#pragma unroll
          for (int i = 0; i < TALL; ++i) {
            float& total = totals[i][j][e];
            total = fmaf(part[i][j][e], times, total);
            if constexpr (AFFINE == 1)
              total = fmaf(part_sum(sums, token + own_token + i * 16 + number / 16, step, p),
                           leasts[p][own_row + j * 16 + number % 16], total);
          }
        }
      }
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int number = round_to_int(numbers[e]);
#pragma unroll
    for (int i = 0; i < TALL; ++i) {
      const int of = token + own_token + i * 16 + number / 16;
      const float size = of < M ? load_constant(back + of) : 0.0f;
#pragma unroll
      for (int j = 0; j < WIDE; ++j) {
        const int n = row + own_row + j * 16 + number % 16;
        if (of < M && n < N) {
          const float found = totals[i][j][e];
          const int64_t at = int64_t(of) * N + n;
          out[at] = RESIDUAL ? fmaf(found, size, residual[at]) : found * size;
        }
      }
    }
  }
}
