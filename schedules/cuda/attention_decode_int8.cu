// One token against the part blockIdx.x of its context, over codes: CHUNK positions of one kv head, for ROWS of its
// query heads. See attention_int8.py. Constants as attention_decode.cu, COLUMNS 8; PADDED = D rounded up to 16,
// LEVELS of a query, QUERY_FACTOR.

constexpr int WARPS = THREADS / 32;
constexpr int PAIRS = D / 2;                   // of elements, that a 128-bit load has of 8 keys
constexpr int COLUMN_THREADS = PADDED / COLUMNS;
constexpr int POSITION_PAIRS = THREADS / COLUMN_THREADS;  // whose values are read at once
constexpr float WEIGHT_LEVELS = 32767.0f;
constexpr float SMALLEST = 1e-34f;  // WEIGHT_LEVELS / SMALLEST is finite; what is smaller counts as zero

QUERN_INLINE int32_t pair(float low, float high) {
  return (round_to_int(low) & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(round_to_int(high)) << 16);
}

// Queries to pairs of LEVELS levels of a row's largest element, and what a product of levels and codes is worth.
QUERN_INLINE void round_query(const float* q, int32_t (*query)[ROWS], float* worth, int r, int lane) {
  float most = 0;
  for (int i = lane; i < D; i += 32) most = fmaxf(most, fabsf(load_constant(q + i)));
  most = warp_max(most);
  const bool some = most >= SMALLEST;
  const float inverse = some ? LEVELS / most : 0.0f;
  for (int i = lane; i < PAIRS; i += 32)
    query[i][r] = pair(load_constant(q + 2 * i) * inverse, load_constant(q + 2 * i + 1) * inverse);
  if (lane == 0) worth[r] = some ? most / LEVELS * QUERY_FACTOR : 0.0f;
}

// Scores of 16 keys with all rows. A lane has 8 keys and every 16th pair of elements, then a tree hands it one key.
QUERN_INLINE void score_block(const int8_t* keys, const float* scales, const int32_t (*query)[ROWS],
                              const float* worth, float (*score)[ROWS], int lane) {
  int32_t sums[ROWS][8] = {};
#pragma unroll (PAIRS <= 128 ? (PAIRS + 15) / 16 : 4)
  for (int step = 0; step < (PAIRS + 15) / 16; ++step) {
    const int e = step * 16 + lane / 2;
    if (PAIRS % 16 == 0 || e < PAIRS) {
      const uint4 x = load_constant(reinterpret_cast<const uint4*>(keys + e * 32 + lane % 2 * 16));
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const int32_t value = query[e][r];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[r][2 * i] = dp2a<0>(value, words[i], sums[r][2 * i]);
          sums[r][2 * i + 1] = dp2a<1>(value, words[i], sums[r][2 * i + 1]);
        }
      }
    }
  }
  int own = lane % 2 * 8;
#pragma unroll
  for (int half = 4, mask = 16; half > 0; half /= 2, mask /= 2) {
    const bool upper = (lane & mask) != 0;
    own += upper ? half : 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const int32_t given = upper ? sums[r][i] : sums[r][i + half];
        sums[r][i] = (upper ? sums[r][i + half] : sums[r][i]) + shuffle_xor(given, mask);
      }
  }
  const float scale = load_constant(scales + own);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int32_t sum = sums[r][0] + shuffle_xor(sums[r][0], 2);
    if ((lane & 2) == 0) score[own][r] = capped(static_cast<float>(sum) * (scale * worth[r]));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
KERNEL(const float* __restrict__ q, const int8_t* __restrict__ keys, const int8_t* __restrict__ values,
       const float* __restrict__ k_scale, const float* __restrict__ v_scale, const int* __restrict__ span,
       float* __restrict__ out, float* __restrict__ stats) {
  alignas(16) __shared__ int32_t query[PAIRS][ROWS];
  alignas(16) __shared__ float score[CHUNK][ROWS];
  alignas(16) __shared__ int32_t weight[CHUNK / 2][ROWS];  // pairs of positions
  __shared__ float worth[ROWS], total[ROWS];  // of a product of levels and codes; sum of weights
  alignas(16) __shared__ int32_t gathered[2][THREADS][COLUMNS];
  const int own = span[0], first = blockIdx.x * CHUNK, low = first_seen(own);
  if (first > own || first + CHUNK <= low) return;  // the grid has room for the whole capacity
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int head = blockIdx.y * ROWS, kv = head / GROUP;
  const int count = own - first < CHUNK ? own - first + 1 : CHUNK, begin = low > first ? low - first : 0;
  const float *k_scales = k_scale + kv * CAPACITY + first, *v_scales = v_scale + kv * CAPACITY + first;

  for (int r = warp; r < ROWS; r += WARPS) round_query(q + (head + r) * D, query, worth, r, lane);
  block_sync();
  for (int b = begin / 16 + warp; b * 16 < count; b += WARPS)
    score_block(keys + (int64_t(kv) * (CAPACITY / 16) + first / 16 + b) * (D * 16), k_scales + b * 16, query, worth,
                score + b * 16, lane);
  block_sync();
  for (int r = warp; r < ROWS; r += WARPS) {  // a lane has pairs of positions, from an even one on
    float most = MASKED, sum = 0, largest = 0;
    for (int p = lane * 2; p < count; p += 64)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (p + i >= begin && p + i < count) most = fmaxf(most, score[p + i][r]);
    most = warp_max(most);
    for (int p = lane * 2; p < count; p += 64)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool seen = p + i >= begin && p + i < count;
        const float one = seen ? exp2_approx(score[p + i][r] - most) : 0.0f;
        const float scaled = seen ? one * load_constant(v_scales + p + i) : 0.0f;
        score[p + i][r] = scaled;
        sum += one;
        largest = fmaxf(largest, scaled);
      }
    sum = warp_sum(sum);
    largest = warp_max(largest);
    const bool some = largest >= SMALLEST;
    const float inverse = some ? WEIGHT_LEVELS / largest : 0.0f;
    for (int p = lane * 2; p < count; p += 64)
      weight[p / 2][r] = pair(score[p][r] * inverse, score[p + 1][r] * inverse);
    if (lane == 0) {
      worth[r] = some ? largest / WEIGHT_LEVELS : 0.0f;
      total[r] = sum;
      if (PARTS > 1) {
        float* mine = stats + (blockIdx.x * HEADS + head + r) * 2;
        mine[0] = most, mine[1] = sum;
      }
    }
  }
  block_sync();

  int32_t sums[ROWS][COLUMNS] = {};
  const int column = thread % COLUMN_THREADS * COLUMNS;
  const int8_t* value = values + (int64_t(kv) * (CAPACITY / 2) + first / 2) * (2 * PADDED) + 2 * column;
  if (thread < POSITION_PAIRS * COLUMN_THREADS) {
#pragma unroll 4
    for (int p = begin / 2 + thread / COLUMN_THREADS; 2 * p < count; p += POSITION_PAIRS) {
      const uint4 x = load_constant(reinterpret_cast<const uint4*>(value + int64_t(p) * (2 * PADDED)));
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const int32_t both = weight[p][r];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[r][2 * i] = dp2a<0>(both, words[i], sums[r][2 * i]);
          sums[r][2 * i + 1] = dp2a<1>(both, words[i], sums[r][2 * i + 1]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {  // two buffers: a row is written while the last one is still read
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) gathered[r % 2][thread][i] = sums[r][i];
    block_sync();
    for (int i = thread; i < D; i += THREADS) {
      int32_t sum = 0;
      for (int p = 0; p < POSITION_PAIRS; ++p) sum += (&gathered[r % 2][p * COLUMN_THREADS][0])[i];
      const float real = static_cast<float>(sum) * worth[r];
      out[(blockIdx.x * HEADS + head + r) * D + i] = PARTS > 1 ? real : real / total[r];
    }
  }
}
