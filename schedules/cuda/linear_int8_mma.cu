// Many tokens on tensor cores of sm_80 and later: see linear_int8_mma.py. Constants as linear_int8_tensor.cu, STAGES.
static_assert(sizeof(Stage) * STAGES == SHARED_BYTES, "the launch asks for this much");

template <bool FIRST>
QUERN_INLINE void products(int32_t (&c)[HIGH][2][4], const uint32_t (&a)[HIGH][2][2], const uint32_t (&b)[2][2],
                           const int32_t (&start)[4]) {
#pragma unroll
  for (int r = 0; r < HIGH; ++r) {
    const uint32_t left[4] = {a[r][0][0], a[r][0][1], a[r][1][0], a[r][1][1]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t(&to)[4] = FIRST ? start : static_cast<const int32_t(&)[4]>(c[r][i]);
      if (SHIFTED) {
        mma_16x8x32_unsigned_a(c[r][i], left, b[i], to);
      } else {
        mma_16x8x32(c[r][i], left, b[i], to);
      }
    }
  }
}

// Starts the copies of the spans of one step.
QUERN_INLINE void copy(Stage& stage, const Pointers& p, const Own& own, int first_span) {
  share_out(
      own, first_span, [&](int, const int8_t* from, int at) { async_copy<PIECE>(stage.tokens + at, from); },
      [&](int, const uint4* from, int at) { async_copy<16>(stage.codes + at, from); },
      [&](int, unsigned from, int at) {
        async_copy<sizeof(Scales)>(stage.scale + at, p.scale + from);
        if (ZERO) async_copy<4>(stage.zero + at, p.zero + from);
        if (OFFSET) async_copy<16>(stage.offset + at, p.offset + from);
      },
      [&](int, unsigned from, int at) {
        async_copy<4>(&stage.token[at].scale, p.ascale + from);
        async_copy<4>(&stage.token[at].sum, p.asum + from);
      });
}

QUERN_INLINE void layer(const Pointers& p) {
  Stage* stages = reinterpret_cast<Stage*>(dynamic_shared());
  const int warp = threadIdx.x / 32, own_token = warp % WARPS_M * WM, own_row = warp / WARPS_M * WN;
  const int first_token = (ORDER ? blockIdx.x : blockIdx.y) * BM, first_row = (ORDER ? blockIdx.y : blockIdx.x) * BN;
  if (WIDTH % 32) {  // what copies never reach meets zeros
    uint4* all = reinterpret_cast<uint4*>(stages);
    for (int i = threadIdx.x; i < SHARED_BYTES / 16; i += THREADS) all[i] = uint4{0, 0, 0, 0};
    block_sync();
  }
  const Own own = own_part(p, first_token, first_row / ROWS);
  const int32_t start[4] = {opaque(MAGIC), opaque(MAGIC), opaque(MAGIC), opaque(MAGIC)};  // stay in registers
  Totals totals = {};
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < STEPS) copy(stages[s], p, own, s * STAGE_SPANS);
    async_commit();
  }
  const int end = opaque(STEPS);
  int slot = 0;
#pragma unroll 1
  for (int step = 0; step < end; ++step) {
    async_wait<STAGES - 2>();
    block_sync();
    const int free = slot > 0 ? slot - 1 : STAGES - 1;  // read in the last step, by all
    if (step + STAGES - 1 < STEPS) copy(stages[free], p, own, (step + STAGES - 1) * STAGE_SPANS);
    async_commit();
    const int spans = min(STAGE_SPANS, SPANS - step * STAGE_SPANS);
#pragma unroll 1
    for (int span = 0; span < spans; ++span) multiply(totals, stages[slot], start, span, own_token, own_row);
    slot = slot + 1 < STAGES ? slot + 1 : 0;
  }
  finish(totals, p, first_token + own_token, first_row + own_row);
}
