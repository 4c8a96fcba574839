// Many tokens on tensor cores of sm_72: see linear_int8_wmma.py. Constants as linear_int8_tensor.cu.
template <bool SIXTEEN>
struct PieceType {
  typedef uint4 Type;
};
template <>
struct PieceType<false> {
  typedef uint2 Type;
};
typedef PieceType<PIECE == 16>::Type Piece;

struct Fetched {  // a thread's part of the next step, on its way to shared memory
  Piece tokens[TOKEN_COPIES];
  uint4 codes[CODE_COPIES];
  Scales scale[each(BLOCKS * STAGE_SPANS, THREADS)];
  uint32_t zero[each(BLOCKS * STAGE_SPANS, THREADS)];
  uint4 offset[each(BLOCKS * STAGE_SPANS, THREADS)];
  Token token[each(BM * STAGE_SPANS, THREADS)];
};

QUERN_INLINE void fetch(Fetched& f, const Pointers& p, const Own& own, int first_span) {
  share_out(
      own, first_span,
      [&](int i, const int8_t* from, int) { f.tokens[i] = load_constant(reinterpret_cast<const Piece*>(from)); },
      [&](int i, const uint4* from, int) { f.codes[i] = load_constant(from); },
      [&](int i, unsigned from, int) {
        f.scale[i] = load_constant(p.scale + from);
        if (ZERO) f.zero[i] = load_constant(p.zero + from);
        if (OFFSET) f.offset[i] = load_constant(p.offset + from);
      },
      [&](int i, unsigned from, int) {
        const uint32_t sum = load_constant(reinterpret_cast<const uint32_t*>(p.asum) + from);
        f.token[i] = Token{load_constant(p.ascale + from), static_cast<int32_t>(sum)};
      });
}

QUERN_INLINE void put(Stage& stage, const Fetched& f, const Own& own, int first_span) {
  share_out(
      own, first_span,
      [&](int i, const int8_t*, int at) { *reinterpret_cast<Piece*>(stage.tokens + at) = f.tokens[i]; },
      [&](int i, const uint4*, int at) { stage.codes[at] = f.codes[i]; },
      [&](int i, unsigned, int at) {
        stage.scale[at] = f.scale[i];
        if (ZERO) stage.zero[ZERO ? at : 0] = f.zero[i];
        if (OFFSET) stage.offset[OFFSET ? at : 0] = f.offset[i];
      },
      [&](int i, unsigned, int at) { stage.token[at] = f.token[i]; });
}

template <bool FIRST>
QUERN_INLINE void products(int32_t (&c)[HIGH][2][4], const uint32_t (&a)[HIGH][2][2], const uint32_t (&b)[2][2],
                           const int32_t (&start)[4]) {
#pragma unroll
  for (int r = 0; r < HIGH; ++r)
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t right[2] = {b[0][w], b[1][w]};
      int32_t to[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] = FIRST && w == 0 ? start[i % 4] : c[r][i / 4][i % 4];
      wmma_multiply(to, a[r][w], right);
#pragma unroll
      for (int i = 0; i < 8; ++i) c[r][i / 4][i % 4] = to[i];
    }
}

// NVIDIA documents fragments of mma alone. What those of wmma hold on sm_72 is known from ptxas, which makes plain
// accesses of wmma.load; here the warp asks, by loading the numbers 0 to 255, and stops if that is not so.
QUERN_INLINE void require_known_fragments(Stage& stage) {
  int32_t* numbers = reinterpret_cast<int32_t*>(&stage);
  int8_t* bytes = reinterpret_cast<int8_t*>(numbers + 256);
  for (int i = threadIdx.x; i < 256; i += THREADS) numbers[i] = i, bytes[i] = static_cast<int8_t>(i);
  block_sync();
  const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  int32_t c[8];
  uint32_t a[2], b[2];
  wmma_load_c(c, numbers, 16);
  wmma_load_a(a, bytes, 16);
  wmma_load_b(b, bytes, 16);
  bool known = true;
#pragma unroll
  for (int i = 0; i < 8; ++i) known = known && c[i] == 16 * (group + i / 2 % 2 * 8) + i / 4 * 8 + 2 * quad + i % 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t four = 0x03020100u + 0x01010101u * (16 * (group + 8 * i) + 4 * quad);
    known = known && a[i] == four && b[i] == four;
  }
  if (!known) trap();
  block_sync();
}

QUERN_INLINE void layer(const Pointers& p) {
  alignas(32) __shared__ Stage stage;
  const int warp = threadIdx.x / 32, own_token = warp % WARPS_M * WM, own_row = warp / WARPS_M * WN;
  const int first_token = (ORDER ? blockIdx.x : blockIdx.y) * BM, first_row = (ORDER ? blockIdx.y : blockIdx.x) * BN;
  const Own own = own_part(p, first_token, first_row / ROWS);
  Fetched fetched;
  fetch(fetched, p, own, 0);
  require_known_fragments(stage);
  if (WIDTH % 32) {  // what no step reaches meets zeros
    uint4* all = reinterpret_cast<uint4*>(&stage);
    for (int i = threadIdx.x; i < int(sizeof(Stage) / 16); i += THREADS) all[i] = uint4{0, 0, 0, 0};
    block_sync();
  }
  const int32_t start[4] = {opaque(MAGIC), opaque(MAGIC), opaque(MAGIC), opaque(MAGIC)};
  Totals totals = {};
  const int end = opaque(STEPS);
#pragma unroll 1
  for (int step = 0; step < end; ++step) {
    put(stage, fetched, own, step * STAGE_SPANS);
    block_sync();
    if (step + 1 < STEPS) fetch(fetched, p, own, (step + 1) * STAGE_SPANS);
    const int spans = min(STAGE_SPANS, SPANS - step * STAGE_SPANS);
#pragma unroll 1
    for (int span = 0; span < spans; ++span) multiply(totals, stage, start, span, own_token, own_row);
    block_sync();
  }
  finish(totals, p, first_token + own_token, first_row + own_row);
}
