// Many tokens on tensor cores of sm_72: see linear_int8_wmma.py.
constexpr int WARPS = WARPS_M * WARPS_N, THREADS = WARPS * 32;
constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N, MT = WM / 16, NT = WN / 16;
constexpr int RUNS_IN_SPAN = UNITS / RUN, LAST_LANES = SLOTS - (TILES - 1) * 32;
constexpr int BLOCKS = BN / ROWS, STEPS = (SPANS + STAGE_SPANS - 1) / STAGE_SPANS;
constexpr int SPAN_BYTES = K_STEPS * 16;                   // of a token or row in shared memory
constexpr int STRIDE = STAGE_SPANS * SPAN_BYTES + 16;      // 16 more: rows start in different banks
template <bool SIXTEEN> struct PieceType { typedef uint4 Type; };
template <> struct PieceType<false> { typedef uint2 Type; };
typedef PieceType<WIDTH % 16 == 0>::Type Piece;
constexpr int PIECES = WIDTH / sizeof(Piece), TOKEN_PIECES = BM * STAGE_SPANS * PIECES;
constexpr int CODE_UNITS = BLOCKS * STAGE_SPANS * UNITS;
constexpr int each(int items) { return (items + THREADS - 1) / THREADS; }

struct Pair {
  float scale;
  int32_t integer;  // sum of a token's span, or zero of a row's
};
struct Stage {
  alignas(32) int8_t tokens[BM * STRIDE];
  alignas(32) int8_t rows[BN * STRIDE];
  alignas(16) Pair of_token[STAGE_SPANS * BM];
  alignas(16) Pair of_row[STAGE_SPANS * BN];
  alignas(16) float offset[OFFSET ? STAGE_SPANS * BN : 1];
};
static_assert(sizeof(Stage) >= 1024, "numbers are kept there for a moment");
struct Fetched {
  Piece tokens[each(TOKEN_PIECES)];
  uint4 codes[each(CODE_UNITS)];
  Pair of_token[each(BM * STAGE_SPANS)];
  Scales scale[each(BLOCKS * STAGE_SPANS)];
  uint32_t zero[each(BLOCKS * STAGE_SPANS)];
  uint4 offset[each(BLOCKS * STAGE_SPANS)];
};
// What item i of the codes is: its row block, span of the step, and unit of the span.
struct Unit {
  int block, span, unit, place;
};
QUERN_INLINE Unit unit_of(int i, int first_span) {
  const int run = i % (RUNS_IN_SPAN * STAGE_SPANS), step = i / (RUNS_IN_SPAN * STAGE_SPANS) % RUN;
  const int slot = first_span * RUNS_IN_SPAN + run, tile = slot / 32;
  return Unit{i / (UNITS * STAGE_SPANS), run / RUNS_IN_SPAN, run % RUNS_IN_SPAN * RUN + step,
              tile * 32 * RUN + step * (tile == TILES - 1 ? LAST_LANES : 32) + slot % 32};
}

QUERN_INLINE void fetch(Fetched& f, const Pointers& p, int first_span, int first_token, int first_block) {
  const int spans = min(STAGE_SPANS, SPANS - first_span);
#pragma unroll
  for (int j = 0; j < each(TOKEN_PIECES); ++j) {
    const int i = threadIdx.x + j * THREADS, span = i / PIECES % STAGE_SPANS, token = i / (PIECES * STAGE_SPANS);
    if (i < TOKEN_PIECES && span < spans)
      f.tokens[j] = load_constant(reinterpret_cast<const Piece*>(
          p.q + (static_cast<int64_t>(min(first_token + token, M - 1)) * SPANS + first_span + span) * WIDTH) + i % PIECES);
  }
#pragma unroll
  for (int j = 0; j < each(CODE_UNITS); ++j) {
    const int i = threadIdx.x + j * THREADS;
    const Unit u = unit_of(i, first_span);
    if (i < CODE_UNITS && u.span < spans)
      f.codes[j] = load_constant(
          p.codes + static_cast<int64_t>(min(first_block + u.block, ROW_BLOCKS - 1)) * POSITIONS + u.place);
  }
#pragma unroll
  for (int j = 0; j < each(BM * STAGE_SPANS); ++j) {
    const int i = threadIdx.x + j * THREADS, span = i / BM;
    const int from = min(first_token + i % BM, M - 1) * SPANS + first_span + span;
    if (i < BM * STAGE_SPANS && span < spans) {
      const uint32_t sum = load_constant(reinterpret_cast<const uint32_t*>(p.asum) + from);
      f.of_token[j] = Pair{load_constant(p.ascale + from) * UNIT, static_cast<int32_t>(sum)};
    }
  }
#pragma unroll
  for (int j = 0; j < each(BLOCKS * STAGE_SPANS); ++j) {
    const int i = threadIdx.x + j * THREADS, span = i / BLOCKS;
    const int from = min(first_block + i % BLOCKS, ROW_BLOCKS - 1) * SPANS + first_span + span;
    if (i < BLOCKS * STAGE_SPANS && span < spans) {
      f.scale[j] = load_constant(p.scale + from);
      if (ZERO) f.zero[j] = load_constant(p.zero + from);
      if (OFFSET) f.offset[j] = load_constant(p.offset + from);
    }
  }
}

QUERN_INLINE void put(Stage& stage, const Fetched& f, int first_span) {
  const int spans = min(STAGE_SPANS, SPANS - first_span);
#pragma unroll
  for (int j = 0; j < each(TOKEN_PIECES); ++j) {
    const int i = threadIdx.x + j * THREADS, span = i / PIECES % STAGE_SPANS, token = i / (PIECES * STAGE_SPANS);
    if (i < TOKEN_PIECES && span < spans)
      *(reinterpret_cast<Piece*>(stage.tokens + token * STRIDE + span * SPAN_BYTES) + i % PIECES) = f.tokens[j];
  }
#pragma unroll
  for (int j = 0; j < each(CODE_UNITS); ++j) {
    const int i = threadIdx.x + j * THREADS;
    const Unit u = unit_of(i, first_span);
    if (i < CODE_UNITS && u.span < spans) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const uint32_t word = word_of(f.codes[j], r);
        int8_t* to = stage.rows + (u.block * ROWS + r) * STRIDE + u.span * SPAN_BYTES + u.unit * (32 / BITS);
        if (BITS == 8) {
          *reinterpret_cast<uint32_t*>(to) = word;
        } else {
          int32_t first = first_inputs(word), last = last_inputs(word);
          if (TABLE) table_inputs(word, first, last);
          *reinterpret_cast<uint2*>(to) = uint2{static_cast<uint32_t>(first), static_cast<uint32_t>(last)};
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < each(BM * STAGE_SPANS); ++j) {
    const int i = threadIdx.x + j * THREADS;
    if (i < BM * STAGE_SPANS && i / BM < spans) stage.of_token[i] = f.of_token[j];
  }
#pragma unroll
  for (int j = 0; j < each(BLOCKS * STAGE_SPANS); ++j) {
    const int i = threadIdx.x + j * THREADS;
    if (i < BLOCKS * STAGE_SPANS && i / BLOCKS < spans) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        stage.of_row[i * ROWS + r] = Pair{scale_of(f.scale[j], r), ZERO ? zero_of(f.zero[j], r) : STORED_ZERO};
        if (OFFSET) stage.offset[OFFSET ? i * ROWS + r : 0] = scale_of(f.offset[j], r);
      }
    }
  }
}

QUERN_INLINE void multiply(float (&acc)[MT][NT][8], const Stage& stage, const int32_t (&place)[8], int span, int warp_m,
                           int warp_n) {
  uint32_t a[MT][K_STEPS][2];
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k)
      wmma_load_a(a[mt][k], stage.tokens + (warp_m * WM + mt * 16) * STRIDE + span * SPAN_BYTES + k * 16, STRIDE);
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    const int first_row = warp_n * WN + nt * 16;
    int32_t c[MT][8];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int i = 0; i < 8; ++i) c[mt][i] = MAGIC;
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k) {
      uint32_t b[2];
      wmma_load_b(b, stage.rows + first_row * STRIDE + span * SPAN_BYTES + k * 16, STRIDE);
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) wmma_multiply(c[mt], a[mt][k], b);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = first_row + place[i] % 16;
      const Pair of_row = stage.of_row[span * BN + row];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        const Pair of_token = stage.of_token[span * BM + warp_m * WM + mt * 16 + place[i] / 16];
        int32_t total = c[mt][i];
        if (!TABLE) total -= of_row.integer * of_token.integer;
        const float centred = bits_float(static_cast<uint32_t>(total)) - MAGIC_VALUE;
        acc[mt][nt][i] = fmaf(centred, of_row.scale * of_token.scale, acc[mt][nt][i]);
        if (OFFSET)
          acc[mt][nt][i] = fmaf(stage.offset[OFFSET ? span * BN + row : 0],
                                static_cast<float>(of_token.integer) * of_token.scale, acc[mt][nt][i]);
      }
    }
  }
}

QUERN_INLINE void layer(const Pointers& p) {
  __shared__ Stage stage;
  const int warp = threadIdx.x / 32, warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
  const int first_token = (ORDER ? blockIdx.x : blockIdx.y) * BM, first_row = (ORDER ? blockIdx.y : blockIdx.x) * BN;
  Fetched fetched;
  fetch(fetched, p, 0, first_token, first_row / ROWS);

  int32_t place[8];
  int32_t* numbers = reinterpret_cast<int32_t*>(&stage);
  for (int i = threadIdx.x; i < 256; i += THREADS) numbers[i] = i;
  block_sync();
  wmma_load_c(place, numbers, 16);
  block_sync();
  if (WIDTH % 16) {  // the last half of a span's last step multiplies zeros
    for (int i = threadIdx.x; i < BM * STRIDE / 16; i += THREADS)
      reinterpret_cast<uint4*>(stage.tokens)[i] = uint4{0, 0, 0, 0};
    for (int i = threadIdx.x; i < BN * STRIDE / 16; i += THREADS)
      reinterpret_cast<uint4*>(stage.rows)[i] = uint4{0, 0, 0, 0};
    block_sync();
  }

  float acc[MT][NT][8] = {};
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    put(stage, fetched, step * STAGE_SPANS);
    block_sync();
    if (step + 1 < STEPS) fetch(fetched, p, (step + 1) * STAGE_SPANS, first_token, first_row / ROWS);
#pragma unroll 1
    for (int span = 0; span < min(STAGE_SPANS, SPANS - step * STAGE_SPANS); ++span)
      multiply(acc, stage, place, span, warp_m, warp_n);
    block_sync();
  }
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int token = first_token + warp_m * WM + mt * 16 + place[i] / 16;
        const int row = first_row + warp_n * WN + nt * 16 + place[i] % 16;
        const int64_t at = static_cast<int64_t>(token) * N + row;
        if (token < M && row < N) p.out[at] = RESIDUAL ? p.residual[at] + acc[mt][nt][i] : acc[mt][nt][i];
      }
}
