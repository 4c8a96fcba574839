// What integer linear layers on tensor cores share: some spans of a tile in shared memory, codes packed as they come,
// and a warp's products with them. Constants as linear_int8_common.cu, BM tokens, BN rows, WARPS_M, WARPS_N, K_STEPS of
// 32 inputs a span, STAGE_SPANS of a step, A_STRIDE bytes between tokens, W_STRIDE units between row blocks, ORDER,
// UNSIGNED: whether signed activations may meet unsigned weights.
//
// Weights are the left operand, tokens the right one. Where an input stands in k is free if both agree: of a span's
// 4 * 8 * K_STEPS inputs lane t of four takes the t-th part, eight inputs a k-step. Which row stands where is free,
// too: rows g and g + 8 of tile r are rows 2 r and 2 r + 1 of row block g. So one load of 16 bytes gives a lane its
// codes of two tiles and one its activations of two k-steps, and its results are the rows of one row block.
constexpr int WARPS = WARPS_M * WARPS_N, THREADS = WARPS * 32;
constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N, PAIRS = WM / 16;  // of tiles of 8 tokens
constexpr int EACH = WN < 32 ? WN / 8 : 4, HIGH = EACH / 2;          // a lane's rows of a row block, and their tiles
constexpr int COLUMNS = WN / (8 * EACH);                             // of 8 row blocks
constexpr int WORDS = BITS / 4, STEP_UNITS = 4 * WORDS;              // a word has 8 inputs of 4 bits, 4 of 8 bits
constexpr int BLOCKS = BN / ROWS, STEPS = (SPANS + STAGE_SPANS - 1) / STAGE_SPANS;
constexpr bool WHOLE = SPANS % STAGE_SPANS == 0;   // every step has all its spans
constexpr int AT_ONCE = K_STEPS % 2 == 0 ? 2 : 1;  // k-steps whose activations one load brings
// Zero points leave the codes before they are multiplied (plus 128, unsigned), or the sums afterwards.
constexpr bool SHIFTED = UNSIGNED && ZERO && BITS == 4, CORRECTED = !SHIFTED && ZERO;

struct Token {
  float scale;
  int32_t sum;
};
struct Stage {
  alignas(16) uint8_t tokens[BM * A_STRIDE];
  alignas(16) uint4 codes[BLOCKS * W_STRIDE];  // [row block][span][k-step][word of 8 inputs][lane t]
  alignas(16) Scales scale[BLOCKS * STAGE_SPANS];
  alignas(16) uint4 offset[OFFSET ? BLOCKS * STAGE_SPANS : 1];
  alignas(16) uint32_t zero[ZERO ? BLOCKS * STAGE_SPANS : 1];
  alignas(16) Token token[STAGE_SPANS * BM];
};

// ---- who brings what of a step. A power of two of lanes share a row, so a thread has the same place in all rows.
constexpr int each(int items, int at_once) { return (items + at_once - 1) / at_once; }
constexpr int padded(int items) {
  int lanes = 1;
  while (lanes < items) lanes *= 2;
  return lanes;
}
constexpr int PIECE = WIDTH % 16 == 0 ? 16 : 8, SPAN_PIECES = WIDTH / PIECE, PIECES = STAGE_SPANS * SPAN_PIECES;
constexpr int PIECE_LANES = padded(PIECES), TOKENS_APART = THREADS / PIECE_LANES, TOKEN_COPIES = each(BM, TOKENS_APART);
constexpr int SPAN_RUNS = UNITS / RUN, RUNS = STAGE_SPANS * SPAN_RUNS, LAST_LANES = SLOTS - (TILES - 1) * 32;
constexpr int UNIT_LANES = padded(RUNS * RUN), BLOCKS_APART = THREADS / UNIT_LANES;
constexpr int CODE_COPIES = each(BLOCKS, BLOCKS_APART);

struct Own {  // a thread's part of a step, in its first row of each kind
  const int8_t* q;
  const uint4* codes;
  int token, token_span, tokens_at, block, run, step, codes_at, first_token, first_block;
};

QUERN_INLINE Own own_part(const Pointers& p, int first_token, int first_block) {
  Own own;
  const int piece = threadIdx.x % PIECE_LANES, unit = threadIdx.x % UNIT_LANES;
  own.token = threadIdx.x / PIECE_LANES, own.token_span = piece / SPAN_PIECES;
  own.tokens_at = own.token * A_STRIDE + own.token_span * K_STEPS * 32 + piece % SPAN_PIECES * PIECE;
  // Neighbouring threads take neighbouring lanes of the packed layout: the same step of the runs beside each other.
  own.block = threadIdx.x / UNIT_LANES, own.run = unit % RUNS, own.step = unit / RUNS;
  const int of_span = own.run % SPAN_RUNS * RUN + own.step, eight = of_span / WORDS;
  own.codes_at = own.block * W_STRIDE + (own.run / SPAN_RUNS * K_STEPS + eight % K_STEPS) * STEP_UNITS +
                 of_span % WORDS * 4 + eight / K_STEPS;
  own.first_token = first_token, own.first_block = first_block;
  own.q = p.q + int64_t(min(first_token + own.token, M - 1)) * (SPANS * WIDTH) + piece * PIECE;
  own.codes = p.codes + int64_t(min(first_block + own.block, ROW_BLOCKS - 1)) * POSITIONS;
  return own;
}

// How many rows behind the thread's first one. There are `last` (fewer than none: the first is the array's last).
template <bool ALL>
QUERN_INLINE int rows_apart(int rows, int last) {
  return ALL ? rows : max(0, min(rows, last));
}

// Calls token_piece(i, from, at), code_unit(i, from, at) and so on for all that the thread brings of the step that
// begins with `first_span`; i counts its own. Rows beyond the arrays repeat the last one.
template <class Pieces, class Units, class Rows, class Tokens>
QUERN_INLINE void share_out(const Own& own, int first_span, Pieces token_piece, Units code_unit, Rows row_scales,
                            Tokens token_scales) {
  const int spans = min(STAGE_SPANS, SPANS - first_span);
  if (threadIdx.x % PIECE_LANES < PIECES && (WHOLE || own.token_span < spans)) {
    const int8_t* from = own.q + first_span * WIDTH;
#pragma unroll
    for (int i = 0; i < TOKEN_COPIES; ++i) {
      if (BM % TOKENS_APART != 0 && own.token + i * TOKENS_APART >= BM) continue;
      const int apart = rows_apart<M % BM == 0>(i * TOKENS_APART, M - 1 - own.first_token - own.token);
      token_piece(i, from + apart * (SPANS * WIDTH), own.tokens_at + i * TOKENS_APART * A_STRIDE);
    }
  }
  if (threadIdx.x % UNIT_LANES < RUNS * RUN && (WHOLE || own.run / SPAN_RUNS < spans)) {
    const int slot = first_span * SPAN_RUNS + own.run, tile = slot / 32;
    const int place = tile * (32 * RUN) + own.step * (tile == TILES - 1 ? LAST_LANES : 32) + slot % 32;
    const uint4* from = own.codes + place;
#pragma unroll
    for (int i = 0; i < CODE_COPIES; ++i) {
      if (BLOCKS % BLOCKS_APART != 0 && own.block + i * BLOCKS_APART >= BLOCKS) continue;
      const int apart = rows_apart<N % BN == 0>(i * BLOCKS_APART, ROW_BLOCKS - 1 - own.first_block - own.block);
      code_unit(i, from + apart * POSITIONS, own.codes_at + i * BLOCKS_APART * W_STRIDE);
    }
  }
#pragma unroll
  for (int j = 0; j < each(BLOCKS * STAGE_SPANS, THREADS); ++j) {
    const int i = threadIdx.x + j * THREADS, span = i % STAGE_SPANS;
    if (i < BLOCKS * STAGE_SPANS && (WHOLE || span < spans))
      row_scales(j, min(own.first_block + i / STAGE_SPANS, ROW_BLOCKS - 1) * SPANS + first_span + span, i);
  }
#pragma unroll
  for (int j = 0; j < each(BM * STAGE_SPANS, THREADS); ++j) {
    const int i = (THREADS - 1 - threadIdx.x) + j * THREADS, span = i % STAGE_SPANS;  // the last threads first
    if (i < BM * STAGE_SPANS && (WHOLE || span < spans))
      token_scales(j, min(own.first_token + i / STAGE_SPANS, M - 1) * SPANS + first_span + span,
                   span * BM + i / STAGE_SPANS);
  }
}

// ---- products
typedef float Totals[COLUMNS][PAIRS][HIGH][2][4];  // of tile r and 8 tokens i: [2 * row of the two + token of the two]

// A k-step of a lane: c[r][i] (+)= a[r] b[i]. a[r][first or last four inputs][row of the two], b[i][the same four].
// FIRST: sums begin with `start`.
template <bool FIRST>
QUERN_INLINE void products(int32_t (&c)[HIGH][2][4], const uint32_t (&a)[HIGH][2][2], const uint32_t (&b)[2][2],
                           const int32_t (&start)[4]);

QUERN_INLINE void load_words(uint32_t (&to)[4], const uint32_t* from) {
  const uint4 x = *reinterpret_cast<const uint4*>(from);
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
QUERN_INLINE void load_words(uint32_t (&to)[2], const uint32_t* from) {
  const uint2 x = *reinterpret_cast<const uint2*>(from);
  to[0] = x.x, to[1] = x.y;
}

// A lane's weights of a k-step: rows `row`.. of the row block whose unit it is.
QUERN_INLINE void weights_of(uint32_t (&a)[HIGH][2][2], const uint4* unit, int row, const uint32_t (&shift)[EACH]) {
  uint32_t words[WORDS][EACH];
#pragma unroll
  for (int w = 0; w < WORDS; ++w) load_words(words[w], reinterpret_cast<const uint32_t*>(unit + 4 * w) + row);
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    int32_t first = words[0][j], last = words[WORDS - 1][j];
    if (TABLE) {
      table_inputs(words[0][j], first, last);
    } else if (BITS == 4) {
      first = first_inputs(words[0][j]), last = last_inputs(words[0][j]);
      if (SHIFTED) first += shift[j], last += shift[j];  // no byte overflows: 15 + 128
    }
    a[j / 2][0][j % 2] = first, a[j / 2][1][j % 2] = last;
  }
}

// Activations of 8 tokens, all k-steps of a span: of token `at`.
QUERN_INLINE void inputs_of(uint32_t (&b)[K_STEPS][2][2], int i, const Stage& stage, int at, int span, int quad) {
#pragma unroll
  for (int k = 0; k < K_STEPS; k += AT_ONCE) {
    uint32_t words[2 * AT_ONCE];
    load_words(words, reinterpret_cast<const uint32_t*>(stage.tokens + at * A_STRIDE + span * K_STEPS * 32 +
                                                        (quad * K_STEPS + k) * 8));
#pragma unroll
    for (int w = 0; w < 2 * AT_ONCE; ++w) b[k + w / 2][i][w % 2] = words[w];
  }
}

// A warp's tokens from `first_token` and rows from `first_row` of the tile, one span: totals += scale * by * integer.
QUERN_INLINE void multiply(Totals& totals, const Stage& stage, const int32_t (&start)[4], int span, int first_token,
                           int first_row) {
  const int lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const int row = EACH < 4 ? first_row % 32 / 8 : 0;  // the lane's first of its row block
#pragma unroll
  for (int column = 0; column < COLUMNS; ++column) {
    const int block = first_row / 32 * 8 + column * 8 + group, of_block = block * STAGE_SPANS + span;
    uint32_t a[K_STEPS][HIGH][2][2], shift[EACH] = {};
    if (SHIFTED) {
      const uint32_t less = 0x80808080u - stage.zero[ZERO ? of_block : 0];
#pragma unroll
      for (int j = 0; j < EACH; ++j) shift[j] = permute_bytes(less, 0, 0x1111u * (row + j));
    }
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k)
      weights_of(a[k], stage.codes + block * W_STRIDE + (span * K_STEPS + k) * STEP_UNITS + quad, row, shift);
    float scale[EACH], offset[EACH], minus_zero[EACH];
    const Scales scales = stage.scale[of_block];
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      scale[j] = scale_of(scales, row + j);
      offset[j] = OFFSET ? scale_of(stage.offset[OFFSET ? of_block : 0], row + j) : 0.0f;
      minus_zero[j] = 0;
      if (CORRECTED)
        minus_zero[j] = MAGIC_VALUE - bits_float(MAGIC + zero_of(stage.zero[ZERO ? of_block : 0], row + j));
    }
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
      uint32_t b[K_STEPS][2][2];
      int32_t c[HIGH][2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        inputs_of(b, i, stage, first_token + pair * 16 + i * 8 + group, span, quad);
      products<true>(c, a[0], b[0], start);
#pragma unroll
      for (int k = 1; k < K_STEPS; ++k) products<false>(c, a[k], b[k], start);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Token token = stage.token[span * BM + first_token + pair * 16 + i * 8 + quad * 2 + e];
          const float by = token.scale * UNIT, sum = bits_float(MAGIC + token.sum) - MAGIC_VALUE;
          // What shifted codes, or 8-bit ones stored minus 128, make of a token's sums: -(1.5 * 2^23 + n) as bits.
          const int32_t extra = SHIFTED ? 128 : ZERO ? 0 : STORED_ZERO;
          float less = bits_float(static_cast<uint32_t>(MAGIC + extra * token.sum) | 0x80000000u);
#pragma unroll
          for (int j = 0; j < EACH; ++j) {
            if (CORRECTED) less = fmaf(minus_zero[j], sum, -MAGIC_VALUE);  // exact
            const float centred = bits_float(static_cast<uint32_t>(c[j / 2][i][j % 2 * 2 + e])) + less;
            float& to = totals[column][pair][j / 2][i][j % 2 * 2 + e];
            to = fmaf(centred, scale[j] * by, to);
            if (OFFSET) to = fmaf(offset[j], sum * by, to);
          }
        }
    }
  }
}

// The warp's results, from token `first_token` and row `first_row` of the layer on.
QUERN_INLINE void finish(const Totals& totals, const Pointers& p, int first_token, int first_row) {
  const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
  for (int all = 0; all < COLUMNS * PAIRS * 4; ++all) {
    const int column = all / (PAIRS * 4), pair = all / 4 % PAIRS, i = all / 2 % 2, e = all % 2;
    const int token = first_token + pair * 16 + i * 8 + quad * 2 + e;
    const int row = first_row / 32 * 32 + column * 32 + group * ROWS + (EACH < 4 ? first_row % 32 / 8 : 0);
    const int64_t at = static_cast<int64_t>(token) * N + row;
    float x[EACH];
#pragma unroll
    for (int j = 0; j < EACH; ++j) x[j] = totals[column][pair][j / 2][i][j % 2 * 2 + e];
    if (token < M && N % 4 == 0 && EACH == 4 && row < N) {
      float4 base = {0.0f, 0.0f, 0.0f, 0.0f};
      if (RESIDUAL) base = *reinterpret_cast<const float4*>(p.residual + at);
      *reinterpret_cast<float4*>(p.out + at) =
          float4{base.x + x[0], base.y + x[1], base.z + x[EACH - 2], base.w + x[EACH - 1]};
    } else if (token < M) {
#pragma unroll
      for (int j = 0; j < EACH; ++j)
        if (row + j < N) p.out[at + j] = RESIDUAL ? p.residual[at + j] + x[j] : x[j];
    }
  }
}
