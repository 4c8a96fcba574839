// TOKENS x ROWS by half2 multiply-adds: a thread has TOKENS / 8 tokens x 4 rows. Constants as linear_half_stage.cu.

QUERN_INLINE void run(const Half* rounded, const float* back, const float* sums, const uint32_t* codes,
                      const Scale* scale, const uint8_t* zero, const float* offset, const float* residual, float* out) {
  constexpr int EACH = TOKENS / 8, ACROSS = ROWS / 4;  // tokens of a thread; threads side by side
  alignas(16) __shared__ Half activations[TOKENS * PITCH];
  alignas(16) __shared__ Half weights[ROWS * PITCH];
  __shared__ float scales[PARTS][ROWS], leasts[PARTS][ROWS];
  __shared__ Half table[16];
  const int thread = threadIdx.x, token = (ORDER ? blockIdx.x : blockIdx.y) * TOKENS, row = (ORDER ? blockIdx.y : blockIdx.x) * ROWS;
  const int own_token = thread / ACROSS, own_row = thread % ACROSS;
  fill_table(table);
  float totals[EACH][4] = {};
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
      Half2 part[EACH][4];
#pragma unroll
      for (int k = 0; k < PART; k += 8) {
        uint32_t left[EACH][4], right[4][4];
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
          const uint4 x = *reinterpret_cast<const uint4*>(activations + (own_token + 8 * i) * PITCH + p * PART + k);
          left[i][0] = x.x, left[i][1] = x.y, left[i][2] = x.z, left[i][3] = x.w;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint4 x = *reinterpret_cast<const uint4*>(weights + (own_row + ACROSS * j) * PITCH + p * PART + k);
          right[j][0] = x.x, right[j][1] = x.y, right[j][2] = x.z, right[j][3] = x.w;
        }
#pragma unroll
        for (int c = 0; c < 4; ++c)
#pragma unroll
          for (int i = 0; i < EACH; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const Half2 a = Half2{left[i][c]}, b = Half2{right[j][c]};
              part[i][j] = k == 0 && c == 0 ? mul_half2(a, b) : fma_half2(a, b, part[i][j]);
            }
      }
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        float sum = 0;
        if constexpr (AFFINE == 1) sum = part_sum(sums, token + own_token + 8 * i, step, p);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 two = to_float2(part[i][j]);
          totals[i][j] = fmaf(two.x + two.y, scales[p][own_row + ACROSS * j], totals[i][j]);
          if constexpr (AFFINE == 1) totals[i][j] = fmaf(sum, leasts[p][own_row + ACROSS * j], totals[i][j]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int of = token + own_token + 8 * i;
    if (of >= M) continue;
    const float size = load_constant(back + of);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = row + own_row + ACROSS * j;
      const int64_t at = int64_t(of) * N + n;
      if (n < N) out[at] = RESIDUAL ? fmaf(totals[i][j], size, residual[at]) : totals[i][j] * size;
    }
  }
}
