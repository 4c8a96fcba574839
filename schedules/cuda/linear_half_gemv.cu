// One token: a team of TEAM warps has 8 rows, a block ROWS / 8 teams, which share the activations. See linear_half.py.
// Constants as linear_half_shared.cu, ROWS, THREADS, SLICE: chunks whose activations are in shared memory at a time.

constexpr int TEAM = THREADS / 32 / (ROWS / 8), CHUNKS = STORED / CHUNK;
constexpr int GROUPS_OF_CHUNK = CHUNK > WIDTH ? CHUNK / WIDTH : 1;
constexpr int PITCH = CHUNK + 8;       // halves of a chunk's activations: 8 lanes that read 128 bits lie in 32 banks
constexpr int FOURS = CHUNK / 4;       // lanes that round a chunk together
constexpr int PIECES = SLICE * FOURS;  // of 4 activations

struct Staged {  // of SLICE chunks
  alignas(16) Half activations[SLICE * PITCH];  // `back` times too large
  float back[SLICE], sums[AFFINE == 1 ? SLICE : 1][HALVES];  // of 16 inputs, in their own size
};

// Neighbouring lanes read neighbouring activations, so that a warp's load asks for 4 lines; a chunk is scaled by its own
// power of two.
QUERN_INLINE void stage(const float* x, int first_chunk, Staged& to) {
  const int thread = threadIdx.x, last = PIECES < (CHUNKS - first_chunk) * FOURS ? PIECES : (CHUNKS - first_chunk) * FOURS;
#pragma unroll 2
  for (int first = 0; first < PIECES; first += THREADS) {
    const int piece = first + thread, place = first_chunk * CHUNK + 4 * piece;
    float values[4] = {};
    if (piece < last) {
      if constexpr (DENSE) {
        const uint4 y = load_constant(reinterpret_cast<const uint4*>(x + place));
        values[0] = bits_float(y.x), values[1] = bits_float(y.y);
        values[2] = bits_float(y.z), values[3] = bits_float(y.w);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int k = input_of(place + i);
          values[i] = k < 0 ? 0.0f : load_constant(x + k);
        }
      }
    }
    float most = fmaxf(fmaxf(fabsf(values[0]), fabsf(values[1])), fmaxf(fabsf(values[2]), fabsf(values[3])));
    most = warp_max<FOURS>(most);
    float back;
    const float times = to_eight(most, back);
    const Half2 low = to_half2(values[0] * times, values[1] * times), high = to_half2(values[2] * times, values[3] * times);
    const int chunk = piece / FOURS;
    if (piece < last) {
      *reinterpret_cast<uint2*>(to.activations + chunk * PITCH + piece % FOURS * 4) = uint2{low.bits, high.bits};
      if (piece % FOURS == 0) to.back[chunk] = back;
    }
    if constexpr (AFFINE == 1) {
      const float2 a = to_float2(low), b = to_float2(high);
      const float sum = warp_sum<4>((a.x + a.y + (b.x + b.y)) * back);
      if (piece < last && piece % 4 == 0) to.sums[chunk][piece % FOURS / 4] = sum;
    }
  }
}

// Eight neighbouring scales, zeros or offsets.
QUERN_INLINE void load_eight(const Half* p, float (&to)[8]) {
  const uint4 x = load_constant(reinterpret_cast<const uint4*>(p));
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 y = to_float2(Half2{words[i]});
    to[2 * i] = y.x, to[2 * i + 1] = y.y;
  }
}
QUERN_INLINE void load_eight(const float* p, float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 x = load_constant(reinterpret_cast<const uint4*>(p) + i);
    to[4 * i] = bits_float(x.x), to[4 * i + 1] = bits_float(x.y);
    to[4 * i + 2] = bits_float(x.z), to[4 * i + 3] = bits_float(x.w);
  }
}

// A tree of exchanges that sums 8 rows over lanes; 4 neighbouring lanes end with parts of one row. Returns which.
template <int LEFT>
QUERN_INLINE int hand_out(float (&sums)[8], int lane) {
  if constexpr (LEFT == 0) {
    return 0;
  } else {
    constexpr int mask = LEFT * 4;
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < LEFT; ++i) {
      const float given = upper ? sums[i] : sums[i + LEFT];
      sums[i] = (upper ? sums[i + LEFT] : sums[i]) + shuffle_xor(given, mask);
    }
    return (upper ? LEFT : 0) + hand_out<LEFT / 2>(sums, lane);
  }
}

// sums += a chunk of 8 rows from `row` on; `own` is its place in `staged`.
QUERN_INLINE void multiply(const Staged& staged, int own, int chunk, const uint32_t* codes, const Scale* scale,
                           const uint8_t* zero, const float* offset, const Half* table, int row, float (&sums)[8]) {
  uint4 words[8];
#pragma unroll
  for (int r = 0; r < 8; ++r)
    words[r] = load_stream(reinterpret_cast<const uint4*>(codes) + int64_t(row + r) * CHUNKS + chunk);
  Half2 activations[CHUNK / 2];
#pragma unroll
  for (int i = 0; i < CHUNK / 2; i += 4) {
    const uint4 x = *reinterpret_cast<const uint4*>(staged.activations + own * PITCH + 2 * i);
    activations[i].bits = x.x, activations[i + 1].bits = x.y, activations[i + 2].bits = x.z;
    activations[i + 3].bits = x.w;
  }
  const float back = staged.back[own];
#pragma unroll
  for (int part = 0; part < GROUPS_OF_CHUNK; ++part) {  // two where 32 inputs have two scales
    int group = chunk * CHUNK / WIDTH + part;
    if (GROUPS_OF_CHUNK > 1 && group >= GROUPS) group = GROUPS - 1;  // padding, whose activations are 0
    const int64_t place = (int64_t(row / 8) * GROUPS + group) * 8;
    float scales[8], offsets[8];
    load_eight(scale + place, scales);
    uint2 zeros = uint2{0, 0};
    if constexpr (AFFINE == 0) zeros = load_constant(reinterpret_cast<const uint2*>(zero + place));
    if constexpr (AFFINE == 1) load_eight(offset + place, offsets);
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const uint32_t four[4] = {words[r].x, words[r].y, words[r].z, words[r].w};
      Half2 sum[HALVES];
      const Zero less = AFFINE == 1 ? zero_of(CENTRE, 0) : zero_of(r < 4 ? zeros.x : zeros.y, r % 4);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        Half2 weights[PAIRS];
        if constexpr (AFFINE == 2) {
          pairs(four[t], table, weights);
        } else {
          pairs(four[t], less, weights);
        }
#pragma unroll
        for (int j = 0; j < PAIRS; ++j) {
          if (GROUPS_OF_CHUNK > 1 && j / 2 != part) continue;
          const Half2 activation = activations[j / 2 * 8 + j % 2 * 4 + t];
          Half2& to = sum[j / 2];
          to = t == 0 && j % 2 == 0 ? mul_half2(weights[j], activation) : fma_half2(weights[j], activation, to);
        }
      }
      const Half2 both = HALVES > 1 && GROUPS_OF_CHUNK == 1 ? add_half2(sum[0], sum[HALVES - 1])
                                                            : sum[GROUPS_OF_CHUNK > 1 ? part : 0];
      const float2 two = to_float2(both);
      sums[r] = fmaf(two.x + two.y, scales[r] * back, sums[r]);
      if constexpr (AFFINE == 1) {
        const float* by_half = staged.sums[own];
        const float least = fmaf(scales[r], static_cast<float>(CENTRE), offsets[r]);
        if constexpr (GROUPS_OF_CHUNK > 1) {
          sums[r] = fmaf(least, by_half[part], sums[r]);
        } else {
          sums[r] = fmaf(least, HALVES > 1 ? by_half[0] + by_half[HALVES - 1] : by_half[0], sums[r]);
        }
      }
    }
  }
}

QUERN_INLINE void run(const float* x, const uint32_t* codes, const Scale* scale, const uint8_t* zero,
                      const float* offset, const float* residual, float* out) {
  __shared__ Staged staged;
  __shared__ Half table[16];
  __shared__ float gathered[TEAM][ROWS];
  const int thread = threadIdx.x, lane = thread % 32, team = thread / 32 / TEAM, member = thread / 32 % TEAM;
  const int row = blockIdx.x * ROWS;
  fill_table(table);
  float sums[8] = {};
  const int slices = opaque(CHUNKS);
#pragma unroll 1
  for (int slice = 0; slice < slices; slice += SLICE) {
    if (slice > 0) block_sync();
    stage(x, slice, staged);
    block_sync();
    const int end = CHUNKS - slice < SLICE ? CHUNKS - slice : SLICE;
#pragma unroll 1
    for (int own = member * 32 + lane; own < end; own += 32 * TEAM)
      multiply(staged, own, slice + own, codes, scale, zero, offset, table, row + team * 8, sums);
  }
  const int own = hand_out<4>(sums, lane);
#pragma unroll
  for (int mask = 2; mask > 0; mask /= 2) sums[0] += shuffle_xor(sums[0], mask);
  if (lane % 4 == 0) gathered[member][team * 8 + own] = sums[0];
  block_sync();
  if (thread < ROWS && row + thread < N) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < TEAM; ++w) sum += gathered[w][thread];
    if constexpr (RESIDUAL) sum += residual[row + thread];
    out[row + thread] = sum;
  }
}
