// Many tokens on tensor cores of sm_80 and later: see linear_int8_mma.py.
constexpr int WARPS = WARPS_M * WARPS_N, THREADS = WARPS * 32;
constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N, MT = WM / 16, NT = WN / 8;
constexpr int RUNS_IN_SPAN = UNITS / RUN, LAST_LANES = SLOTS - (TILES - 1) * 32;
constexpr int STEP_UNITS = 32 * BITS / 32;  // units of 32 inputs: 4, or 8 of 8 bits
constexpr int BLOCKS = BN / ROWS;
constexpr int STEPS = (SPANS + STAGE_SPANS - 1) / STAGE_SPANS;
constexpr int PIECE = WIDTH % 16 == 0 ? 16 : 8;

struct Stage {
  alignas(16) uint8_t tokens[BM * A_STRIDE];
  alignas(16) uint4 codes[BLOCKS * W_STRIDE];
  alignas(16) Scales scale[BLOCKS * STAGE_SPANS];
  alignas(16) uint4 offset[OFFSET ? BLOCKS * STAGE_SPANS : 1];
  alignas(16) uint32_t zero[ZERO ? BLOCKS * STAGE_SPANS : 1];
  alignas(16) float token_scale[BM * STAGE_SPANS];
  alignas(16) int32_t token_sum[BM * STAGE_SPANS];
};
static_assert(sizeof(Stage) * STAGES == SHARED_BYTES, "the launch asks for this much");


// Starts the copies of the spans of one step.
QUERN_INLINE void copy(Stage& stage, const Pointers& p, int first_span, int first_token, int first_block) {
  const unsigned spans = min(STAGE_SPANS, SPANS - first_span);
  for (unsigned i = threadIdx.x; i < BM * STAGE_SPANS * (WIDTH / PIECE); i += THREADS) {
    const unsigned piece = i % (WIDTH / PIECE), span = i / (WIDTH / PIECE) % STAGE_SPANS;
    const unsigned token = i / (WIDTH / PIECE * STAGE_SPANS);
    if (span < spans)
      async_copy<PIECE>(
          stage.tokens + token * A_STRIDE + span * K_STEPS * 32 + piece * PIECE,
          p.q + (static_cast<int64_t>(min(first_token + int(token), M - 1)) * SPANS + first_span + span) * WIDTH + piece * PIECE);
  }
  for (unsigned i = threadIdx.x; i < BLOCKS * UNITS * STAGE_SPANS; i += THREADS) {
    // Neighbouring threads take neighbouring lanes of the layout: the same step of the runs beside each other.
    const unsigned run = i % (RUNS_IN_SPAN * STAGE_SPANS), step = i / (RUNS_IN_SPAN * STAGE_SPANS) % RUN;
    const unsigned block = i / (UNITS * STAGE_SPANS), span = run / RUNS_IN_SPAN;
    const unsigned slot = first_span * RUNS_IN_SPAN + run, tile = slot / 32;
    const unsigned place = tile * 32 * RUN + step * (tile == TILES - 1 ? LAST_LANES : 32) + slot % 32;
    if (span < spans)
      async_copy<16>(stage.codes + block * W_STRIDE + span * K_STEPS * STEP_UNITS + run % RUNS_IN_SPAN * RUN + step,
                     p.codes + static_cast<int64_t>(min(first_block + int(block), ROW_BLOCKS - 1)) * POSITIONS + place);
  }
  for (unsigned i = threadIdx.x; i < BLOCKS * STAGE_SPANS; i += THREADS) {
    const unsigned span = i % STAGE_SPANS;
    const unsigned from = min(first_block + int(i / STAGE_SPANS), ROW_BLOCKS - 1) * SPANS + first_span + span;
    if (span < spans) {
      async_copy<sizeof(Scales)>(stage.scale + i, p.scale + from);
      if (ZERO) async_copy<4>(stage.zero + i, p.zero + from);
      if (OFFSET) async_copy<16>(stage.offset + i, p.offset + from);
    }
  }
  for (unsigned i = threadIdx.x; i < BM * STAGE_SPANS; i += THREADS) {
    const unsigned span = i % STAGE_SPANS, from = min(first_token + int(i / STAGE_SPANS), M - 1) * SPANS + first_span + span;
    if (span < spans) {
      async_copy<4>(stage.token_scale + i, p.ascale + from);
      async_copy<4>(stage.token_sum + i, p.asum + from);
    }
  }
}

QUERN_INLINE void fragment_of_codes(uint32_t (&b)[2], const uint4* units, int lane) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(units) + lane / 4 % 4;  // of the row
  if (BITS == 8) {
    b[0] = words[lane % 4 * 8], b[1] = words[lane % 4 * 8 + 4];
  } else if (TABLE) {
    int32_t low, high;
    table_inputs(words[lane % 4 * 4], low, high);
    b[0] = low, b[1] = high;
  } else {
    const uint32_t word = words[lane % 4 * 4];
    b[0] = first_inputs(word), b[1] = last_inputs(word);
  }
}

// acc += this span of the stage, of the warp's tokens and rows.
QUERN_INLINE void multiply(float (&acc)[MT][NT][4], const Stage& stage, int span, int warp_m, int warp_n, int lane) {
  const int group = lane / 4, quad = lane % 4;
  uint32_t a[MT][K_STEPS][4];
  float by[MT][2];
  int32_t sum[MT][2];
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = warp_m * WM + mt * 16 + half * 8 + group;
      by[mt][half] = stage.token_scale[token * STAGE_SPANS + span] * UNIT;
      sum[mt][half] = stage.token_sum[token * STAGE_SPANS + span];
#pragma unroll
      for (int k = 0; k < K_STEPS; ++k) {
        const uint2 inputs = *reinterpret_cast<const uint2*>(
            stage.tokens + token * A_STRIDE + (span * K_STEPS + k) * 32 + 8 * quad);
        a[mt][k][half] = inputs.x, a[mt][k][half + 2] = inputs.y;
      }
    }
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    const int column = warp_n * WN + nt * 8;  // first of 8 rows
    const int block = (column / ROWS + quad / 2) * STAGE_SPANS + span, row = quad % 2 * 2;  // of 2 rows of the lane
    const Scales scales = stage.scale[block];
    const uint32_t zeros = ZERO ? stage.zero[block] : 0;
    int32_t c[MT][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t minus_zero = ZERO ? -zero_of(zeros, row + i % 2) : -STORED_ZERO;
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) c[mt][i] = TABLE ? MAGIC : MAGIC + minus_zero * sum[mt][i / 2];
    }
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k) {
      uint32_t b[2];
      fragment_of_codes(b, stage.codes + (column / ROWS + group / 4) * W_STRIDE + (span * K_STEPS + k) * STEP_UNITS, lane);
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) mma_16x8x32(c[mt], a[mt][k], b);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = scale_of(scales, row + i % 2);
      const float offset = OFFSET ? scale_of(stage.offset[OFFSET ? block : 0], row + i % 2) : 0.0f;
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        const float centred = bits_float(static_cast<uint32_t>(c[mt][i])) - MAGIC_VALUE;
        float& to = acc[mt][nt][i];
        to = fmaf(centred, scale * by[mt][i / 2], to);
        if (OFFSET) to = fmaf(offset, static_cast<float>(sum[mt][i / 2]) * by[mt][i / 2], to);
      }
    }
  }
}

QUERN_INLINE void layer(const Pointers& p) {
  Stage* stages = reinterpret_cast<Stage*>(dynamic_shared());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
  const int first_token = (ORDER ? blockIdx.x : blockIdx.y) * BM, first_row = (ORDER ? blockIdx.y : blockIdx.x) * BN;
  if (WIDTH % 32) {  // what copies never reach meets zeros
    uint4* all = reinterpret_cast<uint4*>(stages);
    for (int i = threadIdx.x; i < SHARED_BYTES / 16; i += THREADS) all[i] = uint4{0, 0, 0, 0};
    block_sync();
  }
  float acc[MT][NT][4] = {};
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < STEPS) copy(stages[s], p, s * STAGE_SPANS, first_token, first_row / ROWS);
    async_commit();
  }
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    async_wait<STAGES - 2>();
    block_sync();
    const int next = step + STAGES - 1;
    if (next < STEPS) copy(stages[next % STAGES], p, next * STAGE_SPANS, first_token, first_row / ROWS);
    async_commit();
#pragma unroll 1
    for (int span = 0; span < min(STAGE_SPANS, SPANS - step * STAGE_SPANS); ++span)
      multiply(acc, stages[step % STAGES], span, warp_m, warp_n, lane);
  }
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = first_token + warp_m * WM + mt * 16 + half * 8 + lane / 4;
        const int row = first_row + warp_n * WN + nt * 8 + lane % 4 * 2;
        const int64_t i = static_cast<int64_t>(token) * N + row;
        const float x = acc[mt][nt][2 * half], y = acc[mt][nt][2 * half + 1];
        if (token < M && N % 2 == 0 && row < N) {
          float2 base = {0.0f, 0.0f};
          if (RESIDUAL) base = *reinterpret_cast<const float2*>(p.residual + i);
          *reinterpret_cast<float2*>(p.out + i) = float2{base.x + x, base.y + y};
        } else if (token < M) {
          if (row < N) p.out[i] = RESIDUAL ? p.residual[i] + x : x;
          if (row + 1 < N) p.out[i + 1] = RESIDUAL ? p.residual[i + 1] + y : y;
        }
      }
}
