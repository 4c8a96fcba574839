// TOKENS x ROWS by mma.m16n8k16 (sm_80 on). Weights stay packed in shared memory: a word of a row has just the
// inputs that a lane's fragments want. Constants as linear_half_shared.cu, TOKENS, ROWS, WARPS, STAGES of copies.

constexpr int THREADS = 32 * WARPS, STEP = 64, PITCH = STEP + 8;
constexpr int DOWN = TOKENS > 64 ? TOKENS / 64 : 1, ACROSS = WARPS / DOWN;
constexpr int TALL = TOKENS / 16 / DOWN, WIDE = ROWS / 8 / ACROSS;
constexpr int CHUNKS = STORED / CHUNK, STEP_CHUNKS = STEP / CHUNK, PARTS = STEP / SPAN;

// A thread copies 8 activations of every APART-th token, and a chunk of every WORD_APART-th row.
constexpr int APART = THREADS / (STEP / 8), COPIES = (TOKENS + APART - 1) / APART;
constexpr int WORD_APART = THREADS / STEP_CHUNKS, WORD_COPIES = (ROWS + WORD_APART - 1) / WORD_APART;
constexpr bool WHOLE = M % TOKENS == 0 && STORED % STEP == 0;  // no tile reaches beyond the arrays

struct From {  // what a thread copies of the first step
  const Half* activations;
  const uint32_t* codes;
  int token;
};

QUERN_INLINE void stage(const From& from, int step, Half* activations, uint4* words) {
  const int thread = threadIdx.x, unit = thread % (STEP / 8) * 8, chunk = thread % STEP_CHUNKS;
  const Half* of_step = from.activations + step;  // one sum, then constants
  const uint32_t* codes = from.codes + step / CHUNK * 4;
  activations += thread / (STEP / 8) * PITCH + unit, words += chunk * ROWS + thread / STEP_CHUNKS;
#pragma unroll
  for (int i = 0; i < COPIES; ++i) {
    if (TOKENS % APART != 0 && thread / (STEP / 8) + i * APART >= TOKENS) continue;
    Half* to = activations + i * APART * PITCH;
    const Half* x = of_step + i * APART * STORED;
    if constexpr (WHOLE) {
      async_copy16(to, x);
    } else {
      const bool there = from.token + i * APART < M && step + unit < STORED;
      async_copy16(to, there ? x : from.activations, there ? 16 : 0);
    }
  }
#pragma unroll
  for (int i = 0; i < WORD_COPIES; ++i) {
    if (ROWS % WORD_APART != 0 && thread / STEP_CHUNKS + i * WORD_APART >= ROWS) continue;
    uint4* to = words + i * WORD_APART;
    const uint32_t* x = codes + i * WORD_APART * (CHUNKS * 4);
    if constexpr (WHOLE) {
      async_copy16(to, x);
    } else {
      const bool there = step + chunk * CHUNK < STORED;
      async_copy16(to, there ? x : from.codes, there ? 16 : 0);
    }
  }
}

QUERN_INLINE void run(const Half* rounded, const float* back, const float* sums, const uint32_t* codes,
                      const Scale* scale, const uint8_t* zero, const float* offset, const float* residual, float* out) {
  alignas(16) __shared__ Half activations[STAGES][TOKENS * PITCH];
  alignas(16) __shared__ uint4 words[STAGES][STEP_CHUNKS * ROWS];
  __shared__ Half table[16];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int token = (ORDER ? blockIdx.x : blockIdx.y) * TOKENS, row = (ORDER ? blockIdx.y : blockIdx.x) * ROWS;
  const int own_token = warp / ACROSS * TALL * 16, own_row = warp % ACROSS * WIDE * 8;
  fill_table(table);
  float totals[TALL][WIDE][4] = {};
  const int first = token + thread / (STEP / 8);
  const From from{rounded + int64_t(first < M ? first : 0) * STORED + thread % (STEP / 8) * 8,
                  codes + (int64_t(row + thread / STEP_CHUNKS) * CHUNKS + thread % STEP_CHUNKS) * 4, first};
  const int groups_before = (row + own_row) / 8 * GROUPS * 8;
  scale += groups_before + 2 * t;
  if constexpr (AFFINE == 0) zero += groups_before + g;
  if constexpr (AFFINE == 1) offset += groups_before + 2 * t;
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s * STEP < STORED) stage(from, s * STEP, activations[s], words[s]);
    async_commit();
  }
  const int end = opaque(STORED);
#pragma unroll 1
  for (int step = 0, slot = 0; step < end; step += STEP, slot = slot + 1 < STAGES ? slot + 1 : 0) {
    float2 scales[PARTS][WIDE], leasts[PARTS][WIDE];
    uint32_t zeros[PARTS][WIDE];
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {  // under way while the step's copies are waited for
      int group = (step + p * SPAN) / WIDTH;
      group = group < GROUPS ? group : GROUPS - 1;  // padding, whose activations are 0
      const Scale* of_group = scale + group * 8;
      const uint8_t* zeros_of_group = zero + group * 8;
#pragma unroll
      for (int j = 0; j < WIDE; ++j) {
        scales[p][j] = two_scales(of_group + j * GROUPS * 8);
        zeros[p][j] = CENTRE;
        if constexpr (AFFINE == 0) zeros[p][j] = load_constant(zeros_of_group + j * GROUPS * 8);
        if constexpr (AFFINE == 1) {
          const float2 least = two_scales(offset + (j * GROUPS + group) * 8);
          leasts[p][j] = float2{fmaf(scales[p][j].x, static_cast<float>(CENTRE), least.x),
                                fmaf(scales[p][j].y, static_cast<float>(CENTRE), least.y)};
        }
      }
    }
    async_wait<STAGES - 2>();
    block_sync();
    const int next = slot > 0 ? slot - 1 : STAGES - 1;  // read in the last step, by all
    if (step + (STAGES - 1) * STEP < STORED)
      stage(from, step + (STAGES - 1) * STEP, activations[next], words[next]);
    async_commit();
    float part[TALL][WIDE][4] = {};
    // The lane's own addresses, once: what follows differs from them by constants.
    const Half* own_inputs = activations[slot] + (own_token + lane % 16) * PITCH + lane / 16 * 8;
    const uint32_t* own_words = reinterpret_cast<const uint32_t*>(words[slot] + own_row + g) + t;
#pragma unroll
    for (int c = 0; c < STEP_CHUNKS; ++c) {
      Half2 weights[WIDE][PAIRS];
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        const int place = c * CHUNK + h * 16, p = place / SPAN;
        if (h == 0 || SPAN == 16) {
#pragma unroll
          for (int j = 0; j < WIDE; ++j) {
            const uint32_t word = own_words[(c * ROWS + j * 8) * 4];
            if constexpr (AFFINE == 2) {
              pairs(word, table, weights[j]);
            } else {
              pairs(word, zero_of(zeros[p][j], 0), weights[j]);
            }
          }
        }
        uint32_t left[TALL][4];
#pragma unroll
        for (int i = 0; i < TALL; ++i)
          load_matrix_x4(left[i], own_inputs + i * 16 * PITCH + place);
#pragma unroll
        for (int j = 0; j < WIDE; ++j) {
          const uint32_t right[2] = {weights[j][2 * h].bits, weights[j][2 * h + 1].bits};
#pragma unroll
          for (int i = 0; i < TALL; ++i) mma_16x8x16(part[i][j], left[i], right);
        }
        if ((place + 16) % SPAN == 0) {
#pragma unroll
          for (int i = 0; i < TALL; ++i)
#pragma unroll
            for (int j = 0; j < WIDE; ++j)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                totals[i][j][e] = fmaf(part[i][j][e], e % 2 == 0 ? scales[p][j].x : scales[p][j].y, totals[i][j][e]);
                part[i][j][e] = 0;
                if constexpr (AFFINE == 1) {
                  const int of = token + own_token + i * 16 + e / 2 * 8 + g;
                  float sum = 0;
                  if (of < M && step + p * SPAN < STORED)
                    sum = load_constant(sums + of * (STORED / SPAN) + step / SPAN + p);
                  totals[i][j][e] = fmaf(sum, e % 2 == 0 ? leasts[p][j].x : leasts[p][j].y, totals[i][j][e]);
                }
              }
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < TALL; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int of = token + own_token + i * 16 + e / 2 * 8 + g;
      if (of >= M) continue;
      const float size = load_constant(back + of);
#pragma unroll
      for (int j = 0; j < WIDE; ++j) {
        const int n = row + own_row + j * 8 + 2 * t + e % 2;
        const float found = totals[i][j][e];
        const int64_t at = int64_t(of) * N + n;
        if (n < N) out[at] = RESIDUAL ? fmaf(found, size, residual[at]) : found * size;
      }
    }
}
