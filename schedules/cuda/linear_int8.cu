// One or a few tokens: see linear_int8.py.
constexpr int THREADS = WARPS * 32, GROUPS = WARPS / SPLIT, STEPS = (TILES + SPLIT - 1) / SPLIT;
constexpr int RUNS_IN_SPAN = UNITS / RUN;
constexpr int LAST_LANES = SLOTS - (TILES - 1) * 32;

struct Fetched {
  uint4 units[RUN];
  Scales scale;
  uint32_t zero;
  uint4 offset;
};
QUERN_INLINE int position(int tile, int step, int lane) {
  return tile * 32 * RUN + step * (tile == TILES - 1 ? LAST_LANES : 32) + lane;
}
// p: of the warp's row block.
QUERN_INLINE void fetch(Fetched& f, const Pointers& p, int tile, int lane) {
  int slot = tile * 32 + lane;
  if (slot >= SLOTS) return;
#pragma unroll
  for (int i = 0; i < RUN; ++i) f.units[i] = load_stream(p.codes + position(tile, i, lane));
  f.scale = load_constant(p.scale + slot / RUNS_IN_SPAN);
  if (ZERO) f.zero = load_constant(p.zero + slot / RUNS_IN_SPAN);
  if (OFFSET) f.offset = load_constant(p.offset + slot / RUNS_IN_SPAN);
}
// sum + sixteen / 16 += the unit's codes times its inputs.
QUERN_INLINE void add_product(uint32_t word, uint32_t x, int32_t& sum, int32_t&) { sum = dp4a(word, x, sum); }
QUERN_INLINE void add_product(uint32_t word, uint2 x, int32_t& sum, int32_t& sixteen) {
  if (TABLE) {
    int32_t first, last;
    table_inputs(word, first, last);
    sum = dp4a(last, x.y, dp4a(first, x.x, sum));
  } else {  // the high nibbles stay where they are: their products count 16 times
    sum = dp4a(first_inputs(word), x.x, sum);
    sixteen = dp4a_unsigned(word & 0xF0F0F0F0u, x.y, sixteen);
  }
}
// Lanes 8 r to 8 r + 7 get the sum of v[r] over all lanes: 6 shuffles for four sums.
QUERN_INLINE float sum_rows(const float (&v)[ROWS], int lane) {
  bool up = lane & 16, odd = lane & 8;
  float a = (up ? v[2] : v[0]) + shuffle_xor(up ? v[0] : v[2], 16);
  float b = (up ? v[3] : v[1]) + shuffle_xor(up ? v[1] : v[3], 16);
  float c = (odd ? b : a) + shuffle_xor(odd ? a : b, 8);
  return warp_sum<8>(c);
}

QUERN_INLINE void layer(const Pointers& p) {
  __shared__ Inputs staged[STAGED ? TOKENS * POSITIONS : 1];
  __shared__ float staged_scale[STAGED ? TOKENS * SPANS : 1];
  __shared__ int32_t staged_sum[STAGED ? TOKENS * SPANS : 1];
  __shared__ float part_sums[SPLIT > 1 ? WARPS * TOKENS * ROWS : 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % SPLIT;
  const int block = blockIdx.x * GROUPS + warp / SPLIT, mine = min(block, ROW_BLOCKS - 1);
  const int token = blockIdx.y * TOKENS;

  Pointers own = p;
  own.codes += static_cast<int64_t>(mine) * POSITIONS;
  own.scale += mine * SPANS;
  if (ZERO) own.zero += mine * SPANS;
  if (OFFSET) own.offset += mine * SPANS;
  Fetched ahead[AHEAD];
#pragma unroll
  for (int a = 0; a < AHEAD; ++a)
    if (part + a * SPLIT < TILES) fetch(ahead[a], own, part + a * SPLIT, lane);

  const Inputs* activations = reinterpret_cast<const Inputs*>(p.q);
  // Places of token t of this block, who may be beyond the last one.
  auto token_span = [=](int t, int span) { return min(token + t, M - 1) * SPANS + span; };
  auto token_unit = [=](int t, int unit) { return static_cast<int64_t>(min(token + t, M - 1)) * POSITIONS + unit; };
  auto scale_at = [&](int at) { return load_constant(p.ascale + at) * UNIT; };
  auto sum_at = [&](int at) {
    return static_cast<int32_t>(load_constant(reinterpret_cast<const uint32_t*>(p.asum) + at));
  };
  if (STAGED) {
    for (unsigned i = threadIdx.x; i < TOKENS * SPANS; i += THREADS) {
      staged_scale[i] = scale_at(token_span(i / SPANS, i % SPANS));
      staged_sum[i] = sum_at(token_span(i / SPANS, i % SPANS));
    }
    for (unsigned i = threadIdx.x; i < TOKENS * POSITIONS; i += THREADS) {
      unsigned t = i / POSITIONS, unit = i % POSITIONS, slot = unit / RUN;
      staged[t * POSITIONS + position(slot / 32, unit % RUN, slot % 32)] =
          load_constant(activations + token_unit(t, unit));
    }
  }
  block_sync();

  float acc[TOKENS][ROWS] = {};
  const int steps = QUERN_SM < 61 ? opaque(STEPS) : STEPS;  // unrolled without dp4a it would take too many registers
#pragma unroll 1
  for (int i = 0; i < steps; i += AHEAD) {
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      const int tile = part + (i + a) * SPLIT, slot = tile * 32 + lane;
      if (tile >= TILES || slot >= SLOTS) continue;
      Fetched& f = ahead[a];
      const int span = slot / RUNS_IN_SPAN;
      const bool first = RUNS_IN_SPAN == 1 || slot % RUNS_IN_SPAN == 0;  // the span's zero is one lane's
      int32_t sum[TOKENS][ROWS], sixteen[TOKENS][ROWS];
      int32_t of_token[TOKENS];
#pragma unroll
      for (int t = 0; t < TOKENS; ++t)
        of_token[t] = STAGED ? staged_sum[t * SPANS + span] : sum_at(token_span(t, span));
#pragma unroll
      for (int t = 0; t < TOKENS; ++t)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          int32_t zero = ZERO ? zero_of(f.zero, r) : STORED_ZERO;
          sum[t][r] = !TABLE && first ? MAGIC - zero * of_token[t] : MAGIC;
          sixteen[t][r] = 0;
        }
#pragma unroll
      for (int s = 0; s < RUN; ++s) {
        Inputs x[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; ++t)
          x[t] = STAGED ? staged[t * POSITIONS + position(tile, s, lane)]
                        : load_constant(activations + token_unit(t, slot * RUN + s));
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const uint32_t word = word_of(f.units[s], r);
#pragma unroll
          for (int t = 0; t < TOKENS; ++t) add_product(word, x[t], sum[t][r], sixteen[t][r]);
        }
      }
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        const float by = STAGED ? staged_scale[t * SPANS + span] : scale_at(token_span(t, span));
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const float centred = bits_float(static_cast<uint32_t>(sum[t][r] + (sixteen[t][r] >> 4))) - MAGIC_VALUE;
          acc[t][r] = fmaf(centred, scale_of(f.scale, r) * by, acc[t][r]);
          if (OFFSET && first)
            acc[t][r] = fmaf(scale_of(f.offset, r), static_cast<float>(of_token[t]) * by, acc[t][r]);
        }
      }
      if (tile + AHEAD * SPLIT < TILES) fetch(f, own, tile + AHEAD * SPLIT, lane);
    }
  }

#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    float sum = sum_rows(acc[t], lane);
    if (SPLIT > 1) {
      if (lane % 8 == 0) part_sums[(warp * TOKENS + t) * ROWS + lane / 8] = sum;
    } else if (lane % 8 == 0 && block < ROW_BLOCKS) {
      int row = block * ROWS + lane / 8, i = (token + t) * N + row;
      if (row < N && token + t < M) p.out[i] = RESIDUAL ? load_constant(p.residual + i) + sum : sum;
    }
  }
  if (SPLIT > 1) {
    block_sync();
    for (int j = threadIdx.x; j < GROUPS * TOKENS * ROWS; j += THREADS) {
      int group = j / (TOKENS * ROWS), t = j / ROWS % TOKENS, row = (blockIdx.x * GROUPS + group) * ROWS + j % ROWS;
      float sum = 0.0f;
      for (int p = 0; p < SPLIT; ++p) sum += part_sums[(group * SPLIT + p) * TOKENS * ROWS + j % (TOKENS * ROWS)];
      int i = (token + t) * N + row;
      if (row < N && token + t < M) p.out[i] = RESIDUAL ? load_constant(p.residual + i) + sum : sum;
    }
  }
}
